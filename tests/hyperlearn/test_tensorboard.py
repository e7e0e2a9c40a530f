"""The TensorBoard callback: what its event files hold."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hyperlearn as hl
from hyperlearn.tensorboard import TensorBoard


def problem() -> hl.BilevelProblem:
    return hl.BilevelProblem(
        lambda y, x: ((y - x) ** 2).sum(),
        lambda y, x: ((y - 1) ** 2).sum(),
        x0=torch.zeros(2),
        y0=torch.zeros(2),
        metrics={"distance": lambda y, x: float((y - x).norm())},
    )


@pytest.mark.parametrize("prefix", ["", "one/"])
def test_scalars_are_the_history(tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    method = hl.IdentityHessian(curvature=2.0, step_size=0.1)
    with TensorBoard(tmp_path, prefix=prefix) as board:
        run = hl.minimize(problem(), method, budget=hl.Budget(steps=25), every=5, callbacks=[board])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {prefix + name for name in run.history} - {
        f"{prefix}step"
    }
    for name, values in run.history.items():
        if name == "step":
            continue
        scalars = events.Scalars(prefix + name)
        np.testing.assert_array_equal([s.step for s in scalars], run.history["step"])
        # Event files hold float32.
        np.testing.assert_array_equal([s.value for s in scalars], values.astype(np.float32))


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name="tensorboard")
        return imported(name, *arguments, **options)

    for name in list(sys.modules):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "hyperlearn\[tensorboard\]"'):
        TensorBoard(tmp_path)
