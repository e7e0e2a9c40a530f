# `make` lists what there is. Every target makes its own environment first, in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
PACKAGES := operators solvers hyperlearn

.PHONY: help demo test lint format docs bench validate clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

.venv: $(READY)  ## the environment: Python packages and, where possible, CHOLMOD
.PHONY: .venv

demo: $(READY)  ## clean noisy labels by bilevel optimisation, 90 seconds, and plot the run
	$(BIN)/hyperlearn run data-cleaning --method nhgd --seed 0 --seconds 90 --out runs/demo.h5 --force
	$(BIN)/hyperlearn plot runs/demo.h5 --out runs/cleaning.png
	@printf '\nThe run:     %s\nThe figure:  %s\n' "$(CURDIR)/runs/demo.h5" "$(CURDIR)/runs/cleaning.png"

test: $(READY)  ## unit tests and the examples in the docstrings (ARGS='-k name -x' for pytest)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(READY)  ## style, types and the layering of the packages
	@failed=0; \
	for check in "ruff check ." "ruff format --check ." "mypy $(PACKAGES)" lint-imports "mkdocs build --strict"; do \
	    echo "$$check"; $(BIN)/$$check || failed=1; \
	done; exit $$failed

format: $(READY)  ## put the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation, as site/index.html
	$(BIN)/mkdocs build --strict

bench: $(READY)  ## timings on this machine (ARGS for its options)
	$(BIN)/python -m validation.bench $(ARGS)

validate: $(READY)  ## checks against finite differences and published tables (ARGS for its options)
	$(BIN)/python -m validation $(ARGS)

clean:  ## remove caches and built files; keeps .venv, data and runs
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .cache
	find $(PACKAGES) tests validation -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
