"""Quasi-Newton estimates of a Jacobian or Hessian and of its inverse: `Broyden`, `LBFGS`.

Both take pairs of a step s and the change y of the function along it, and keep the secant equation
``B s = y`` of the newest pair exactly.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch
from torch import Tensor

from operators.curvature.lbfgs_inverse import LBFGSInverse
from operators.low_rank import LowRankPlusDiagonal
from operators.low_rank_update import LowRankUpdate
from operators.space import Space, Tree


class BroydenInverse(LowRankUpdate):
    """``H = a I + sum_t u_t v_t^T ~ J^-1``: what `Broyden` has learnt of an inverse Jacobian.

    It maps the newest difference to its step, ``H y = s``; see `LowRankUpdate` for the arguments.
    """


class Broyden:
    """Broyden's "good" method with limited memory: ``B ~ J`` and ``H = B^-1`` from pairs.

    A pair (s, y) updates the inverse by the rank-one term that satisfies ``H y = s``,

        H <- H + (s - H y) (s^T H) / (s^T H y) ,   at first  H = scale I ;

    of all matrices with ``B s = y`` this B is the nearest to the one before (Frobenius norm).

    Parameters
    ----------
    space
        Space of the steps; that of the differences is taken to have the same coordinates.
    memory
        Rank-one terms kept. Beyond them the oldest is dropped before the new one is computed, so
        that the newest secant equation stays exact.
    scale
        Of the first H; not 0. Its sign should be that of the Jacobian: for a positive definite one
        positive. Root-finding codes that step along ``+ H g`` start from ``-1``, which makes the
        first residuals grow here.
    threshold
        A pair with ``|s^T H y| <= threshold |H^T s| |y|`` is refused; by default the root of eps.

    Attributes
    ----------
    skipped
        Number of pairs that were refused.

    Raises
    ------
    ValueError
        A setting out of range.

    Notes
    -----
    An update costs ``8 m n`` flops for m terms; holds ``2 m n`` numbers. With memory enough,
    ``x <- x - H g(x)`` ends within 2 n steps on a linear system (Gay, 1979). For symmetric positive
    definite systems conjugate gradients are better; this is for the others.

    Source: Broyden (1965, doi:10.1090/S0025-5718-1965-0198670-6); as an implicit-gradient inverse
    Bai, Kolter and Koltun (2019, arXiv:1909.01377) and Ramzi et al. (2022, arXiv:2106.00553).

    Examples
    --------
    >>> import torch
    >>> estimate = Broyden(Space.flat(2, torch.float32), memory=4)
    >>> estimate.update(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))
    True
    >>> estimate.inverse() @ torch.tensor([2.0, 2.0])
    tensor([1., 0.])
    """

    def __init__(
        self, space: Space, *, memory: int, scale: float = 1.0, threshold: float | None = None
    ) -> None:
        if not abs(scale) > 0:
            raise ValueError(f"scale={scale}; expected a number other than 0")
        self.space, self.scale = space, scale
        self.memory, self.threshold = _check_memory(memory), _threshold(space, threshold)
        self.reset()

    def reset(self) -> None:
        """Forget every pair."""
        self._left: deque[Tensor] = deque(maxlen=self.memory)
        self._right: deque[Tensor] = deque(maxlen=self.memory)
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._left)

    def update(self, step: Tree, difference: Tree) -> bool:
        """Take in a pair: ``y = g(x + s) - g(x)``.

        Returns
        -------
        bool
            False where the pair was refused since its update would break down (`skipped`).

        Raises
        ------
        ValueError
            Wrong shape or structure, or entries that are not finite.
        TypeError
            Wrong dtype or device.
        """
        s, y = _pair(self.space, step, difference)
        full = len(self) == self.memory
        H = self._inverse(list(self._left)[full:], list(self._right)[full:])
        image, row = H._matvec(y), H._transpose()._matvec(s)
        denominator = s @ image
        if not bool(denominator.abs() > self.threshold * row.norm() * y.norm()):
            self.skipped += 1
            return False
        self._left.append((s - image) / denominator)
        self._right.append(row)
        return True

    def inverse(self) -> BroydenInverse:
        """H as of now."""
        return self._inverse(list(self._left), list(self._right))

    def operator(self) -> LowRankUpdate:
        """B as of now: the inverse of H in closed form."""
        return self.inverse().inverse()

    def _inverse(self, left: list[Tensor], right: list[Tensor]) -> BroydenInverse:
        rows = (_stack(self.space, left), _stack(self.space, right))
        return BroydenInverse(*rows, self.scale, space=self.space)


class LBFGS:
    """Limited-memory BFGS: positive definite ``B ~ Hessian`` and ``H = B^-1`` from pairs.

    Parameters
    ----------
    space
        Space of the steps and differences.
    memory
        Pairs kept; a further one replaces the oldest.
    scale
        ``c > 0`` of the initial ``H = c I``; by default ``s^T y / y^T y`` of the newest pair (1
        where there is none).
    curvature
        What to do with a pair that lacks positive curvature. ``"skip"``: refuse it unless
        ``s^T y > threshold |s| |y|``. ``"damp"``: Powell's, replace y by the point between y and
        ``B s`` where ``s^T y = 0.2 s^T B s``, if it is less than that.
    threshold
        By default the root of eps.

    Attributes
    ----------
    skipped, damped
        Number of pairs that were refused, and whose y was replaced.

    Raises
    ------
    ValueError
        A setting out of range.

    Notes
    -----
    An update costs ``O(n)`` (``O(m^2 n)`` under ``"damp"``, for ``B s``); holds ``2 m n`` numbers.
    Source: Nocedal (1980, doi:10.1090/S0025-5718-1980-0572855-7); damping by Powell (1978,
    doi:10.1007/BFb0067703); B unrolled as in Nocedal and Wright (2006, procedure 7.6).

    Examples
    --------
    >>> import torch
    >>> estimate = LBFGS(Space.flat(2, torch.float32), memory=4)
    >>> estimate.update(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    True
    >>> estimate.update(torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0]))
    False
    >>> estimate.inverse().to_dense(), estimate.skipped
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]]), 1)
    """

    def __init__(
        self,
        space: Space,
        *,
        memory: int = 10,
        scale: float | None = None,
        curvature: Literal["skip", "damp"] = "skip",
        threshold: float | None = None,
    ) -> None:
        if scale is not None and not scale > 0:
            raise ValueError(f"scale={scale}; expected > 0, or None for that of the newest pair")
        if curvature not in ("skip", "damp"):
            raise ValueError(f"curvature={curvature!r}; expected 'skip' or 'damp'")
        self.space, self.scale, self.curvature = space, scale, curvature
        self.memory, self.threshold = _check_memory(memory), _threshold(space, threshold)
        self.reset()

    def reset(self) -> None:
        """Forget every pair."""
        self._steps: deque[Tensor] = deque(maxlen=self.memory)
        self._differences: deque[Tensor] = deque(maxlen=self.memory)
        self.skipped = self.damped = 0

    def __len__(self) -> int:
        return len(self._steps)

    def update(self, step: Tree, difference: Tree) -> bool:
        """Take in a pair: ``y = grad f(x + s) - grad f(x)``.

        Returns
        -------
        bool
            False where the pair was refused for want of curvature (`skipped`).

        Raises
        ------
        ValueError
            Wrong shape or structure, or entries that are not finite.
        TypeError
            Wrong dtype or device.
        """
        s, y = _pair(self.space, step, difference)
        if self.curvature == "damp":
            image = self.operator()._matvec(s)
            least = 0.2 * (s @ image)
            if bool(s @ y < least):
                y = y + (0.8 * (s @ image) / (s @ image - s @ y) - 1) * (y - image)
                self.damped += 1
        if not bool(s @ y > self.threshold * s.norm() * y.norm()):
            self.skipped += 1
            return False
        self._steps.append(s)
        self._differences.append(y)
        return True

    def inverse(self) -> LBFGSInverse:
        """H as of now."""
        steps, differences = self._rows()
        return LBFGSInverse(steps, differences, self._initial(), space=self.space)

    def operator(self) -> LowRankPlusDiagonal:
        """B as of now: ``I / c + sum_i y_i y_i^T / s_i^T y_i - b_i b_i^T / s_i^T b_i``.

        Here ``b_i = B_i s_i``, B_i being made of the pairs before. Costs ``O(m^2 n)``.
        """
        steps, differences = self._rows()
        initial = 1 / self._initial()
        gained: list[Tensor] = []
        lost: list[Tensor] = []
        for s, y in zip(steps, differences, strict=True):
            image = initial * s
            for a, b in zip(gained, lost, strict=True):
                image = image + (a @ s) * a - (b @ s) * b
            gained.append(y / (s @ y).sqrt())
            lost.append(image / (s @ image).sqrt())
        weights = torch.cat([steps.new_ones(len(gained)), -steps.new_ones(len(lost))])
        return LowRankPlusDiagonal(
            _stack(self.space, gained + lost),
            initial,
            weights,
            space=self.space,
            positive_definite=True,
        )

    def _rows(self) -> tuple[Tensor, Tensor]:
        return _stack(self.space, list(self._steps)), _stack(self.space, list(self._differences))

    def _initial(self) -> Tensor:
        if self.scale is not None or not self._steps:
            value = 1.0 if self.scale is None else self.scale
            return torch.tensor(value, dtype=self.space.dtype, device=self.space.device)
        s, y = self._steps[-1], self._differences[-1]
        return (s @ y) / (y @ y)


def _check_memory(memory: int) -> int:
    if memory < 1:
        raise ValueError(f"memory={memory}; expected at least 1")
    return memory


def _threshold(space: Space, threshold: float | None) -> float:
    value = torch.finfo(space.dtype).eps ** 0.5 if threshold is None else threshold
    if not 0 <= value < 1:
        raise ValueError(f"threshold={threshold}; expected 0 <= threshold < 1")
    return float(value)


def _pair(space: Space, step: Tree, difference: Tree) -> tuple[Tensor, Tensor]:
    """Flat copies of a pair of trees of the space, or of vectors of their coordinates."""
    flat = []
    for value, name in ((step, "step"), (difference, "difference")):
        vector = space.coordinates(value, name).detach().clone()
        if not bool(torch.isfinite(vector @ vector)):
            raise ValueError(f"{name} is not finite, or its square overflows")
        flat.append(vector)
    return flat[0], flat[1]


def _stack(space: Space, rows: list[Tensor]) -> Tensor:
    if rows:
        return torch.stack(rows)
    return torch.zeros(0, space.size, dtype=space.dtype, device=space.device)
