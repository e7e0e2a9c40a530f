"""`LBFGSInverse`: the limited-memory BFGS inverse, as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.cost import Cost
from operators.linear_operator import LinearOperator, Scalar
from operators.space import Space, check_tensor
from operators.structure import Structure
from operators.tracing import readable


class LBFGSInverse(LinearOperator):
    """``H``: the BFGS inverse of ``c I`` and m pairs, by the two-loop recursion; definite.

    With ``r = 1 / s^T y``, pair by pair from the oldest,

        H <- (I - r s y^T) H (I - r y s^T) + r s s^T ,   at first  H = c I .

    Parameters
    ----------
    steps
        Rows s, oldest first, of shape ``(m, n)``; m may be 0.
    differences
        Rows y, of shape ``(m, n)``.
    scale
        ``c > 0``, one number.
    space
        Space that it acts on; by default plain vectors ``(n,)``.

    Raises
    ------
    ValueError
        A shape does not fit, or some ``s^T y`` or the scale is not positive: H would not be
        definite.
    TypeError
        `differences` or the space has another dtype than `steps`.

    Notes
    -----
    A product costs ``10 m n`` flops. Differentiable with respect to steps, differences and scale.
    Source: Nocedal (1980, doi:10.1090/S0025-5718-1980-0572855-7).

    Examples
    --------
    >>> import torch
    >>> s, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> LBFGSInverse(s, y, 1.0) @ y[0]
    tensor([1., 0.])
    """

    _parameters = ("steps", "differences", "scale")

    def __init__(
        self, steps: Tensor, differences: Tensor, scale: Scalar, *, space: Space | None = None
    ) -> None:
        check_tensor(steps, "steps", "(m, n)")
        check_tensor(differences, "differences", "(m, n)")
        if steps.ndim != 2 or differences.shape != steps.shape:
            raise ValueError(
                f"steps has shape {tuple(steps.shape)} and differences "
                f"{tuple(differences.shape)}; expected (m, n) twice"
            )
        space = space or Space.flat(steps.shape[1], steps.dtype, steps.device)
        if space.size != steps.shape[1]:
            raise ValueError(f"steps has length {steps.shape[1]}, but the space size {space.size}")
        for what, dtype in (("differences", differences.dtype), ("the space", space.dtype)):
            if dtype != steps.dtype:
                raise TypeError(f"{what} has dtype {dtype}, but steps has {steps.dtype}")
        value = torch.as_tensor(scale, dtype=steps.dtype, device=steps.device)
        if value.ndim != 0 or (readable(value) and not bool(value > 0)):
            raise ValueError(f"scale={scale}; expected one number > 0")
        curvature = (steps * differences).sum(1)
        if readable(curvature) and not bool((curvature > 0).all()):
            raise ValueError(
                f"s^T y = {float(curvature.min()):.3g} of a pair; expected all > 0, without which "
                "the inverse is not positive definite (LBFGS skips or damps such pairs)"
            )
        super().__init__(space, space, Structure(positive_definite=True))
        if not readable(curvature, value):
            self._claims = ("positive_definite",)
        self.steps, self.differences, self.scale = steps, differences, value

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        pairs = list(zip(self.steps, self.differences, strict=True))
        curvature = (self.steps * self.differences).sum(1)
        coefficients: list[Tensor] = []
        for (s, y), sy in zip(reversed(pairs), curvature.flip(0), strict=True):
            coefficients.append(s @ block / sy)
            block = block - torch.outer(y, coefficients[-1])
        block = self.scale * block
        for (s, y), sy, coefficient in zip(pairs, curvature, reversed(coefficients), strict=True):
            block = block + torch.outer(s, coefficient - y @ block / sy)
        return block

    def _cost(self) -> Cost:
        return Cost(flops=10 * self.steps.numel() + self.shape[0])

    def _describe(self) -> str:
        return f"{len(self.steps)} pairs"
