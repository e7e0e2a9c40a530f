"""``hyperlearn run``, ``resume``: an experiment, each method a run in a file of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperlearn.budget import Budget
from hyperlearn.cli.app import DIVERGED, INTERRUPTED, app, new_console, new_table, user_errors
from hyperlearn.experiments import BUILT_IN
from hyperlearn.loop import DivergedError
from hyperlearn.runs import Run, load_run
from hyperlearn.settings import known_settings, override, unknown_name

if TYPE_CHECKING:
    from hyperlearn.experiments.experiment import BuiltIn
    from hyperlearn.methods import Method

EXPERIMENTS = tuple(BUILT_IN)


@app.command()
def run(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"The experiment: {', '.join(EXPERIMENTS)}.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Of data-cleaning: nhgd (default), cg10, cg40, neumann10, neumann40, identity, "
            "unrolled, none (x stays where it is). Of the others, which learn the kernel of a PDE: "
            "learn (default), none, and what --list-settings names. Or all. Repeat it to run "
            "several, one after the other."
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Of every random draw; also that of the data or the points, unless --set."
        ),
    ] = 0,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Training time. Without it and --steps, data-cleaning has 60 seconds, and the "
            "experiments with PDEs have 250 steps."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Outer steps, in place of --seconds.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's file or, without a suffix, a folder for it; several methods need a "
            "folder. By default runs/NAME-METHOD-seedSEED.h5."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing run files.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with existing run files of the same settings.")
    ] = False,
    every: Annotated[int, typer.Option(help="Record every so many outer steps.")] = 10,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the task or the method, e.g. train_size=10000, step_size=1e3, "
            "solver.maxiter=20, interior=400. Repeatable. --list-settings shows all.",
        ),
    ] = None,
    list_settings: Annotated[
        bool,
        typer.Option(
            "--list-settings",
            help="Show the methods, and what --set can change for those chosen, and stop.",
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no table.")] = False,
) -> None:
    """Run an experiment; each method's run is stored in an HDF5 file.

    Exit codes: 0 finished, 2 wrong input, 3 diverged, 130 stopped by Ctrl-C. What was recorded
    until then is in the file.
    """
    with user_errors():
        import torch

        from hyperlearn.experiments.experiment import built_in_experiment

        made = built_in_experiment(name)
        if seconds is not None and steps is not None:
            raise ValueError("--seconds and --steps exclude each other: give one of them")
        if force and resume:
            raise ValueError("--force and --resume exclude each other: give one of them")
        given = seconds is not None or steps is not None
        budget = Budget(steps=steps, seconds=seconds) if given else made.default_budget
        task, methods, known = _configured(made, method or [made.default_method], seed, assignments)
        if list_settings:
            _print_settings(task, methods, known)
            return
        names = [f"{name}-{label}-seed{seed}.h5" for label in methods]
        files = _run_files(out, names, kept=not (force or resume))
        if every < 1:
            raise ValueError(f"--every {every}: expected at least 1")
        if threads is not None:
            torch.set_num_threads(threads)
        code = _run_methods(
            made,
            task,
            methods,
            files,
            budget=budget,
            seed=seed,
            overwrite=force,
            resume=resume,
            every=every,
            quiet=quiet,
        )
    raise typer.Exit(code)


@app.command()
def resume(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run of an experiment.")],
    seconds: Annotated[
        float | None,
        typer.Option(help="Training time in all, with what it had; by default as in the file."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Outer steps in all, in place of --seconds.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no table.")] = False,
) -> None:
    """Go on with a run from its last checkpoint, with its own settings.

    Exit codes: 0 finished, 2 wrong input, 3 diverged, 130 stopped by Ctrl-C.
    """
    with user_errors():
        from hyperlearn.experiments.experiment import built_in_experiment

        if seconds is not None and steps is not None:
            raise ValueError("--seconds and --steps exclude each other: give one of them")
        stored = load_run(file)
        name = stored.config.get("problem")
        made = built_in_experiment(name) if name in EXPERIMENTS else None
        ours = made is not None and "task" in stored.config
        task = stored.setting("task") if ours else None
        # Anybody may call a problem of theirs by that name.
        if made is None or type(task) is not type(made.task(0)):
            raise ValueError(
                f"{file} is a run of {name!r}, whose losses are code that "
                f"a file does not hold; expected a run of {', '.join(EXPERIMENTS)}. From Python: "
                f"hyperlearn.resume({str(file)!r}, problem)"
            )
        given = seconds is not None or steps is not None
        code = _run_methods(
            made,
            task,
            {stored.label: stored.setting("method")},
            [file],
            budget=Budget(steps=steps, seconds=seconds) if given else stored.setting("budget"),
            seed=stored.environment["seed"],
            resume=True,
            every=stored.config["every"],
            quiet=quiet,
        )
    raise typer.Exit(code)


def _configured(
    made: BuiltIn, labels: Sequence[str], seed: int, assignments: Sequence[str] | None
) -> tuple[Any, dict[str, Method], Sequence[str]]:
    """Task and methods as they are to be run, and the names of all methods."""
    defaults = made.task(seed)  # --set data_seed=... wins over --seed
    own = {setting.key for setting in known_settings(defaults)}
    given = list(assignments or [])
    (task,) = override([defaults], [one for one in given if one.partition("=")[0].strip() in own])
    table = made.methods(task, seed)  # what a method starts from may depend on the task
    methods: dict[str, Method] = {}
    for label in _chosen(labels, table):
        task, methods[label] = override([defaults, table[label]], given)
    return task, methods, list(table)


def _chosen(names: Sequence[str], known: Mapping[str, Method]) -> list[str]:
    """Method names, each once; "all" stands for every one."""
    for name in names:
        if name not in known and name != "all":
            raise ValueError(unknown_name("method", name, [*known, "all"]))
    return list(known) if "all" in names else list(dict.fromkeys(names))


def _run_files(out: Path | None, names: Sequence[str], *, kept: bool) -> list[Path]:
    """One file a run; everything that would stop a later run is found before the first."""
    out = out or Path("runs")
    files = [out / name for name in names] if out.is_dir() or not out.suffix else [out]
    if len(files) < len(names):
        raise ValueError(f"--out {out}: several methods need a folder, for one file each")
    for file in files:
        if file.exists():
            if kept:
                raise FileExistsError(
                    f"{file} exists; --force overwrites it, --resume goes on with it, --out names "
                    "another place"
                )
            load_run(file)  # raises for what is not a run: such a file is never overwritten
    return files


def _run_methods(
    made: BuiltIn,
    task: Any,
    methods: dict[str, Method],
    files: Sequence[Path],
    *,
    budget: Budget,
    seed: int,
    overwrite: bool = False,
    resume: bool = False,
    every: int,
    quiet: bool,
) -> int:
    """Run the methods one after the other; returns the exit code."""
    runs: list[Run] = []
    code = 0
    for (label, method), file in zip(methods.items(), files, strict=True):
        try:
            result = made.run_method(
                task,
                label,
                method,
                seed=seed,
                budget=budget,
                record=file,
                overwrite=overwrite,
                resume=resume,
                every=every,
                # A log file would get a line for every refresh.
                progress=not quiet and sys.stderr.isatty(),
            )
        except DivergedError as error:
            where = f"what was recorded is in {error.run.path}"
            typer.echo(f"error: {label} diverged: {error}; {where}", err=True)
            result, code = error.run, DIVERGED
        runs.append(result)
        if result.status == "interrupted":
            code = INTERRUPTED
            break
    if not quiet:
        _print_runs(runs)
    return code


# --- the table at the end ---------------------------------------------------------------------


def _last(metric: str, form: str) -> Callable[[Run], str]:
    """The last record of a metric; empty where there is none."""

    def told(run: Run) -> str:
        values = run.history.get(metric)
        return "" if values is None or not len(values) else _told(float(values[-1]), form)

    return told


def _told(value: float, form: str) -> str:
    # Errors and losses of PDEs range over orders of magnitude.
    short = form == ".4f" and not (value == 0 or 0.1 <= abs(value) < 1e4)
    return format(value, ".3g" if short else form)


def _found(name: str) -> Callable[[Run], str]:
    """A number in the result."""
    return lambda run: _told(run.result[name], ".4f") if name in _numbers(run) else ""


def _numbers(run: Run) -> list[str]:
    """Names of the numbers among what a run has found."""
    return [name for name, value in run.result.items() if isinstance(value, float)]


def _hessian_residual(run: Run) -> str:
    residual = None if run.certificate is None else run.certificate.hessian_residual
    return "" if residual is None else f"{residual:.2g}"


def _stationarity(run: Run) -> str:
    certificate = run.certificate
    return "" if certificate is None else f"{certificate.inner_stationarity:.2g}"


def _calls(kind: str) -> Callable[[Run], str]:
    """Oracle calls of a kind; empty if none of any kind was counted."""
    count = _last(kind, ".0f")
    return lambda run: "" if _last("oracle_calls", ".0f")(run) in ("", "0") else count(run)


# Name of a row, and what stands in it. Between the two parts: what else a run has found.
_SUCCESS: list[tuple[str, Callable[[Run], str]]] = [
    ("test accuracy", _last("test_accuracy", ".4f")),
    ("l2 error", _last("l2_error", ".2e")),
    ("linf error", _last("linf_error", ".2e")),
    ("outer loss", _last("outer_loss", ".4f")),
    ("AUC of the weights", _last("weight_auc", ".4f")),
]
_COST: list[tuple[str, Callable[[Run], str]]] = [
    ("seconds", _last("seconds", ".1f")),
    ("outer steps", _last("step", ".0f")),
    ("gradients", _calls("gradients")),
    ("Hessian products", _calls("hessian_products")),
    ("cross products", _calls("cross_products")),
    ("inner stationarity", _stationarity),
    ("adjoint residual (Hessian)", _hessian_residual),
    ("status", lambda run: run.status),
]
_SHOWN = ("l2_error", "linf_error")


def _print_runs(runs: Sequence[Run]) -> None:
    """The last record of each run, a column a method; as many side by side as there is room for."""
    console = new_console()
    found = dict.fromkeys(name for run in runs for name in _numbers(run) if name not in _SHOWN)
    rows = [*_SUCCESS, *((name.replace("_", " "), _found(name)) for name in found), *_COST]
    room = max(1, (console.width - 28) // 13)
    for start in range(0, len(runs), room):
        shown = runs[start : start + room]
        table = new_table()
        table.add_column("method")
        for run in shown:
            table.add_column(str(run.config["label"]), justify="right")
        for name, value in rows:
            values = [value(run) for run in shown]
            if any(values):
                table.add_row(name, *(value or "-" for value in values))
        console.print(table)
    for run in runs:
        if run.status == "interrupted":
            typer.echo(f"{run.config['label']}: {run.message}")
        typer.echo(run.path)
    files = " ".join(str(run.path) for run in runs)
    typer.echo(f"to draw {'it' if len(runs) == 1 else 'them'}: hyperlearn plot {files}")


def _print_settings(task: Any, methods: Mapping[str, Method], known: Sequence[str]) -> None:
    """Key, present value, type and meaning of all that --set can change."""
    typer.echo(f"methods: {', '.join(known)}")
    for title, item in [("task", task), *((f"method {k}", m) for k, m in methods.items())]:
        table = new_table(f"{title}: {type(item).__name__}")
        table.add_column("key", no_wrap=True)
        table.add_column("value", no_wrap=True)
        table.add_column("type")
        table.add_column("meaning", ratio=1)
        for s in known_settings(item):
            table.add_row(s.key, str(s.value), s.expected, s.meaning.replace("`", ""))
        new_console().print(table)
