"""The command line: run an experiment, plot its runs, check derivatives, list the data."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hyperlearn
from hyperlearn.datasets import DatasetError
from hyperlearn.outer import Budget, DivergedError
from hyperlearn.run import Run, load_run
from hyperlearn.settings import known_settings, override, unknown_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hyperlearn.experiments.data_cleaning import CleaningData, DataCleaning
    from hyperlearn.methods import Method

CHECK_FAILED, USER_ERROR, DIVERGED, INTERRUPTED = 1, 2, 3, 130
EXPERIMENTS = ("data-cleaning",)

app = typer.Typer(
    name="hyperlearn",
    help="Bilevel optimisation: run experiments, plot runs, check derivatives, find data sets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def _user_errors() -> Iterator[None]:
    """What a user can put right is told in a line; any other exception keeps its traceback."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    except (ValueError, OSError, DatasetError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hyperlearn {hyperlearn.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Bilevel optimisation: run experiments, plot runs, check derivatives, find data sets."""


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
    with _user_errors():
        if name not in EXPERIMENTS:
            raise ValueError(unknown_name("experiment", name, EXPERIMENTS))
        import torch

        from hyperlearn.experiments.data_cleaning import METHODS, DataCleaning

        if seconds is not None and steps is not None:
            raise ValueError("--seconds and --steps exclude each other: give one of them")
        budget = Budget(steps=steps, seconds=60 if steps is None and seconds is None else seconds)
        labels = _chosen(method or ["nhgd"], METHODS)
        defaults = DataCleaning(data_seed=seed)  # --set data_seed=... wins over --seed
        methods: dict[str, Method] = {}
        for label in labels:
            task, methods[label] = override([defaults, METHODS[label]], assignments or [])
        if list_settings:
            _print_settings(task, methods)
            return
        files = _run_files(out, [f"{name}-{label}-seed{seed}.h5" for label in labels], force=force)
        if every < 1:
            raise ValueError(f"--every {every}: expected at least 1")
        if threads is not None:
            torch.set_num_threads(threads)
        code = _run_cleaning(
            task, methods, files, budget=budget, seed=seed, force=force, every=every, quiet=quiet
        )
    raise typer.Exit(code)


def _chosen(names: Sequence[str], known: dict[str, Method]) -> list[str]:
    """Method names, each once; "all" stands for every one."""
    for name in names:
        if name not in known and name != "all":
            raise ValueError(unknown_name("method", name, [*known, "all"]))
    return list(known) if "all" in names else list(dict.fromkeys(names))


def _run_files(out: Path | None, names: Sequence[str], *, force: bool) -> list[Path]:
    """One file a run; everything that would stop a later run is found before the first."""
    out = out or Path("runs")
    files = [out / name for name in names] if out.is_dir() or not out.suffix else [out]
    if len(files) < len(names):
        raise ValueError(f"--out {out}: several methods need a folder, for one file each")
    for file in files:
        if file.exists():
            if not force:
                raise FileExistsError(
                    f"{file} exists; --force overwrites it, --out names another place"
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
    force: bool,
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
                overwrite=force,
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
    console = _console()
    room = max(1, (console.width - 28) // 13)
    for start in range(0, len(runs), room):
        shown = runs[start : start + room]
        table = _table()
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
        table = _table(f"{title}: {type(item).__name__}")
        table.add_column("key", no_wrap=True)
        table.add_column("value", no_wrap=True)
        table.add_column("type")
        table.add_column("meaning", ratio=1)
        for s in known_settings(item):
            table.add_row(s.key, str(s.value), s.expected, s.meaning.replace("`", ""))
        _console().print(table)


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:OBJECT",
            help="Or FILE.py:OBJECT. A BilevelProblem; a function f(x), with --x; a pair "
            "(function, x); or a function without arguments that returns one of these.",
        ),
    ],
    x: Annotated[
        str | None,
        typer.Option(
            "--x",
            metavar="MODULE:OBJECT",
            help="Where to check: a tensor, a nested structure, or a function without arguments "
            "that returns one. Of a problem, x0 by default.",
        ),
    ] = None,
    directions: Annotated[int, typer.Option(min=1, help="Random directions.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the directions.")] = 0,
    rtol: Annotated[float, typer.Option(help="Relative error to accept.")] = 1e-5,
) -> None:
    """Compare derivatives with finite differences, over a sweep of step sizes.

    Exit codes: 0 passed, 1 failed or could not be decided, 2 wrong input.
    """
    with _user_errors():
        found, point = _check_target(target, x)
        try:
            report = hyperlearn.check(found, point, directions=directions, seed=seed, rtol=rtol)
        except TypeError as error:
            raise ValueError(str(error)) from error
        _console().print(report.table())
        for line in report.remarks():
            typer.echo(line)
    raise typer.Exit(0 if report.passed else CHECK_FAILED)


def _check_target(name: str, x: str | None) -> tuple[Any, Any]:
    """Function or problem, and x or None; factories are called."""
    found = _imported(name)
    if _is_factory(found):
        found = found()
    pair = isinstance(found, tuple) and len(found) == 2
    if pair and x is not None:
        raise ValueError(f"{name} has an x of its own: leave out --x {x}")
    if pair:
        return found
    if x is not None:
        point = _imported(x)
        return found, point() if _is_factory(point) else point
    if not isinstance(found, hyperlearn.BilevelProblem):
        raise ValueError(
            f"{name} is a {type(found).__name__} and no x is given; expected a BilevelProblem, "
            "--x MODULE:OBJECT, or a function without arguments that returns (function, x)"
        )
    return found, None


def _is_factory(found: Any) -> bool:
    """Whether it is called without arguments, and cannot be called with one."""
    if not callable(found):
        return False
    try:
        parameters = inspect.signature(found)
        parameters.bind()
    except (TypeError, ValueError):
        return False
    try:
        parameters.bind(None)
    except TypeError:
        return True
    return False


def _imported(name: str) -> Any:
    """The object that ``module:object`` or ``file.py:object`` names."""
    where, colon, path = name.rpartition(":")
    if not (where and colon and path):
        raise ValueError(
            f"{name} is no name of an object; expected MODULE:OBJECT or FILE.py:OBJECT"
        )
    if where.endswith(".py"):
        file = Path(where)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        # What stands next to the file can be imported by it, as if it were run.
        sys.path.insert(0, str(file.resolve().parent))
        module = _loaded(file)
    else:
        sys.path.insert(0, "")  # a command, unlike python -m, does not look here
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"cannot import {where}: {error}") from error
    try:
        return operator.attrgetter(path)(module)
    except AttributeError as error:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(unknown_name("object", path, public)) from error


def _loaded(file: Path) -> ModuleType:
    """A file as a module; once, so that a problem and its x come from the same one."""
    name = f"_checked_{file.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses of the file look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Runs of data-cleaning.")],
    out: Annotated[
        Path, typer.Option(help="The picture, .png or .pdf; replaced if it exists.")
    ] = Path("cleaning.png"),
) -> None:
    """Draw runs: success over time and oracle calls, the weights, the least trusted images."""
    with _user_errors():
        from hyperlearn.plots import plot_cleaning

        typer.echo(str(plot_cleaning([load_run(file) for file in files], out)))


@app.command()
def data(
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute the checksum of each file.")
    ] = False,
) -> None:
    """List the data sets: size, source, licence, and where each was found."""
    with _user_errors():
        from hyperlearn import datasets

        rows = datasets.describe(verify=verify)
        table = _table()
        columns = ["source", "licence", "found", *(["checksum"] if verify else [])]
        for heading in ("name", "size", *columns):
            table.add_column(heading, overflow="fold", no_wrap=heading in ("name", "size"))
        for row in rows:
            size = f"{int(row['size_bytes']) / 1e6:.1f} MB"
            table.add_row(str(row["name"]), size, *(str(row[column]) for column in columns))
        _console().print(table)
        wrong = [f"{row['name']} ({row['found']})" for row in rows if row["checksum"] == "wrong"]
        if wrong:
            raise ValueError(f"wrong checksum: {', '.join(wrong)}; replace the file")


def _table(title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)


def _console() -> Console:
    from rich.console import Console

    # Into a file or a pipe there is no width to respect.
    return Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)


if __name__ == "__main__":
    app()
