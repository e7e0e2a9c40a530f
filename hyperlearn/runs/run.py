"""`Run`: what a run has found and how it went, in memory or read from its file when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hyperlearn.certificate import Certificate

if TYPE_CHECKING:
    import pandas
    import xarray

Tree = Any


@dataclass
class Run:
    """What a run has found, and how it went.

    Parameters
    ----------
    result
        ``x`` and ``y``, the final outer and inner variables, nested as given, and what else the
        experiment has found. Empty if the run never came that far.
    history
        ``metric -> (records,)``; among them ``step``, ``seconds``, ``outer_loss``,
        ``hypergradient_norm``, the oracle counts and the problem's metrics.
    certificates
        ``field -> (records,)``.
    certificate
        The last one, of the last hypergradient; None if there was none.
    status
        ``"finished"``, ``"running"``, ``"killed"`` (it says that it runs, but no process writes
        it), ``"interrupted"``, ``"diverged"`` or ``"failed"``.
    message
        Why it ended.
    config, environment
        Settings and surroundings.
    attachments
        Arrays and fields that the experiment stored.
    units
        Of metrics that have some.
    checkpoints
        Steps that it can be resumed from.
    path
        Its file, if there is one.

    Notes
    -----
    Of a run from `load_run` the mappings read the file when an entry is asked for, and only that.
    """

    result: Mapping[str, Tree] = field(default_factory=dict)
    history: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    certificates: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    certificate: Certificate | None = None
    status: str = "running"
    message: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    attachments: Mapping[str, Any] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    checkpoints: tuple[int, ...] = ()
    path: Path | None = None

    @property
    def x(self) -> Tree:
        """Final outer variable, nested as given; None if the run never came that far."""
        return self.result.get("x")

    @property
    def y(self) -> Tree:
        """Final inner variable, likewise."""
        return self.result.get("y")

    @property
    def label(self) -> str:
        """What to call its method."""
        method = self.config.get("method")
        named = method.get("class") if isinstance(method, Mapping) else method
        return str(self.config.get("label") or named or "run")

    @property
    def name(self) -> str:
        """Method and seed, for legends."""
        return f"{self.label}, seed {self.environment.get('seed', '?')}"

    def setting(self, name: str, classes: tuple[type, ...] = ()) -> Any:
        """A setting as the object that it was: ``run.setting("method")`` is the method.

        Parameters
        ----------
        name
            In `config`.
        classes
            Of your own settings. Those of this library, and the methods and solvers that are
            imported, are known; nothing is imported because a file names it.

        Raises
        ------
        KeyError
            There is no such setting.
        ValueError
            It is, or holds, an object of a class that is not known.
        """
        from hyperlearn.runs.objects import restored

        if name not in self.config:
            raise KeyError(f"{name!r} is no setting of this run; it has {list(self.config)}")
        return restored(self.config[name], classes)

    def to_pandas(self) -> pandas.DataFrame:
        """The history as a `pandas.DataFrame`, a row a record; settings are in its ``attrs``."""
        from hyperlearn.runs.frames import to_pandas

        return to_pandas(self)

    def to_xarray(self) -> xarray.Dataset:
        """The history as an `xarray.Dataset` over ``record``, with step and costs as coordinates.

        Certificates are variables ``certificate_<field>`` over ``certificate``; fields of the
        result are arrays over their coordinates.
        """
        from hyperlearn.runs.frames import to_xarray

        return to_xarray(self)

    def __repr__(self) -> str:
        records = len(next(iter(self.history.values()), np.empty(0)))
        where = "" if self.path is None else f", {str(self.path)!r}"
        return f"<Run {self.name}: {self.status}, {records} records{where}>"
