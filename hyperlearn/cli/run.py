"""``hyperlearn run``, ``resume``: an experiment, each method a run in a file of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyperlearn.budget import Budget
from hyperlearn.cli.app import DIVERGED, INTERRUPTED, app, new_console, new_table, user_errors
from hyperlearn.loop import DivergedError
from hyperlearn.runs import Run, load_run
from hyperlearn.settings import known_settings, override, unknown_name

if TYPE_CHECKING:
    from hyperlearn.experiments.data_cleaning import CleaningData, DataCleaning
    from hyperlearn.methods import Method

EXPERIMENTS = ("data-cleaning",)


@app.command()
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The experiment: data-cleaning.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="nhgd (default), cg10, cg40, neumann10, neumann40, identity, unrolled, none (x "
            "stays where it is), or all. Repeat it to run several, one after the other."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of every random draw; also the data seed, unless --set.")
    ] = 0,
    seconds: Annotated[
        float | None, typer.Option(help="Training time; 60 if --steps is not given either.")
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
            "solver.maxiter=20. Repeatable. --list-settings shows all.",
        ),
    ] = None,
    list_settings: Annotated[
        bool,
        typer.Option(
            "--list-settings", help="Show what --set can change for these methods, and stop."
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
        if name not in EXPERIMENTS:
            raise ValueError(unknown_name("experiment", name, EXPERIMENTS))
        import torch

        from hyperlearn.experiments.data_cleaning import METHODS, DataCleaning

        if seconds is not None and steps is not None:
            raise ValueError("--seconds and --steps exclude each other: give one of them")
        if force and resume:
            raise ValueError("--force and --resume exclude each other: give one of them")
        budget = Budget(steps=steps, seconds=60 if steps is None and seconds is None else seconds)
        labels = _chosen(method or ["nhgd"], METHODS)
        defaults = DataCleaning(data_seed=seed)  # --set data_seed=... wins over --seed
        methods: dict[str, Method] = {}
        for label in labels:
            task, methods[label] = override([defaults, METHODS[label]], assignments or [])
        if list_settings:
            _print_settings(task, methods)
            return
        names = [f"{name}-{label}-seed{seed}.h5" for label in labels]
        files = _run_files(out, names, kept=not (force or resume))
        if every < 1:
            raise ValueError(f"--every {every}: expected at least 1")
        if threads is not None:
            torch.set_num_threads(threads)
        code = _run_cleaning(
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
        from hyperlearn.experiments.data_cleaning import DataCleaning

        if seconds is not None and steps is not None:
            raise ValueError("--seconds and --steps exclude each other: give one of them")
        stored = load_run(file)
        ours = stored.config.get("problem") in EXPERIMENTS and "task" in stored.config
        task = stored.setting("task") if ours else None
        # Anybody may call a problem of theirs by that name.
        if not isinstance(task, DataCleaning):
            raise ValueError(
                f"{file} is a run of {stored.config.get('problem')!r}, whose losses are code that "
                "a file does not hold; expected a run of "
                f"{', '.join(EXPERIMENTS)}. From Python: "
                f"hyperlearn.resume({str(file)!r}, problem)"
            )
        given = seconds is not None or steps is not None
        code = _run_cleaning(
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


def _chosen(names: Sequence[str], known: dict[str, Method]) -> list[str]:
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


def _run_cleaning(
    task: DataCleaning,
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
    from hyperlearn.experiments.data_cleaning import clean, load_data

    data: CleaningData = load_data(task)
    runs: list[Run] = []
    code = 0
    for (label, method), file in zip(methods.items(), files, strict=True):
        try:
            result = clean(
                method,
                task,
                budget=budget,
                seed=seed,
                data=data,
                label=label,
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


def _last(run: Run, metric: str, form: str) -> str:
    values = run.history.get(metric)
    return "-" if values is None or not len(values) else format(values[-1], form)


def _hessian_residual(run: Run) -> str:
    residual = None if run.certificate is None else run.certificate.hessian_residual
    return "-" if residual is None else f"{residual:.2g}"


# Name of a row, and what stands in it.
_ROWS: list[tuple[str, Callable[[Run], str]]] = [
    ("test accuracy", lambda run: _last(run, "test_accuracy", ".4f")),
    ("outer loss", lambda run: _last(run, "outer_loss", ".4f")),
    ("AUC of the weights", lambda run: _last(run, "weight_auc", ".4f")),
    ("seconds", lambda run: _last(run, "seconds", ".1f")),
    ("outer steps", lambda run: _last(run, "step", ".0f")),
    ("gradients", lambda run: _last(run, "gradients", ".0f")),
    ("Hessian products", lambda run: _last(run, "hessian_products", ".0f")),
    ("cross products", lambda run: _last(run, "cross_products", ".0f")),
    ("adjoint residual (Hessian)", _hessian_residual),
    ("status", lambda run: run.status),
]


def _print_runs(runs: Sequence[Run]) -> None:
    """The last record of each run, a column a method; as many side by side as there is room for."""
    console = new_console()
    room = max(1, (console.width - 28) // 13)
    for start in range(0, len(runs), room):
        shown = runs[start : start + room]
        table = new_table()
        table.add_column("method")
        for run in shown:
            table.add_column(str(run.config["label"]), justify="right")
        for name, value in _ROWS:
            table.add_row(name, *map(value, shown))
        console.print(table)
    for run in runs:
        if run.status == "interrupted":
            typer.echo(f"{run.config['label']}: {run.message}")
        typer.echo(run.path)


def _print_settings(task: DataCleaning, methods: dict[str, Method]) -> None:
    """Key, present value, type and meaning of all that --set can change."""
    for title, item in [("task", task), *((f"method {k}", m) for k, m in methods.items())]:
        table = new_table(f"{title}: {type(item).__name__}")
        table.add_column("key", no_wrap=True)
        table.add_column("value", no_wrap=True)
        table.add_column("type")
        table.add_column("meaning", ratio=1)
        for s in known_settings(item):
            table.add_row(s.key, str(s.value), s.expected, s.meaning.replace("`", ""))
        new_console().print(table)
