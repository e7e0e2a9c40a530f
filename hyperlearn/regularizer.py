"""The inner problem's L2 penalty, kept apart from the likelihood because its curvature is known."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class L2:
    """``weight * |y|^2`` (no factor 1/2), whose Hessian is ``2 weight I``.

    A Fisher matrix is built from scores of the likelihood only; the penalty enters its operator
    as exact curvature ``2 weight``, not as gradients.

    Parameters
    ----------
    weight
        ``>= 0``.
    """

    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"L2: weight={self.weight}; expected a number >= 0")

    def __call__(self, y: Tensor) -> Tensor:
        """``weight |y|^2``."""
        return self.weight * (y * y).sum()

    def gradient(self, y: Tensor) -> Tensor:
        """``2 weight y``."""
        return 2.0 * self.weight * y

    @property
    def curvature(self) -> float:
        """``2 weight``."""
        return 2.0 * self.weight
