"""`TensorBoard`: a callback that shows a run in TensorBoard while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class TensorBoard:
    """Every metric of each record as a scalar over the outer step: a callback of `minimize`.

    Parameters
    ----------
    folder
        For the event files; ``tensorboard --logdir FOLDER`` shows it. One for each run.
    prefix
        Before each metric's name, e.g. ``"nhgd/"``: TensorBoard groups by it.

    Raises
    ------
    ImportError
        TensorBoard is not installed.

    Examples
    --------
    >>> import tempfile, torch, hyperlearn as hl
    >>> folder = tempfile.TemporaryDirectory()
    >>> problem = hl.BilevelProblem(
    ...     lambda y, x: ((y - x) ** 2).sum(),
    ...     lambda y, x: ((y - 1) ** 2).sum(),
    ...     x0=torch.zeros(2),
    ...     y0=torch.zeros(2),
    ... )
    >>> method = hl.IdentityHessian(curvature=2.0, step_size=0.1)
    >>> with TensorBoard(folder.name) as board:
    ...     run = hl.minimize(problem, method, budget=hl.Budget(steps=20), callbacks=[board])
    """

    def __init__(self, folder: str | Path, *, prefix: str = "") -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "tensorboard":
                raise
            raise ImportError(
                "tensorboard is not installed; it comes with hyperlearn's extra tensorboard: "
                'pip install "hyperlearn[tensorboard]"'
            ) from error
        self.folder, self.prefix = Path(folder), prefix
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, record: Mapping[str, float]) -> None:
        """Write one record; it can be seen when this returns."""
        step = int(record["step"])
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(f"{self.prefix}{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file; a further record opens another."""
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
