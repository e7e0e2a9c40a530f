"""`Posterior`: Gaussian processes given linear equations: mean, variance, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyperlearn.gp.backend import Backend, Blocks, Factor, System
from hyperlearn.gp.choice import choose_backend
from hyperlearn.gp.pde import PDE, Equation, Linearised, State
from operators import Functionals, Kernel, Representers
from operators.kernels.jets import axis_pairs, square_of_pairs

Kernels = Mapping[str, Kernel]
Rows = Functionals | Mapping[str, Functionals] | Sequence[Functionals | Mapping[str, Functionals]]


class Posterior:
    """``u ~ GP(0, k)`` given ``L u + e = b``, e independent of variance ``nugget k(L, L) + noise``.

    ``mean = k(., L) alpha`` with ``(K + nugget diag K + N) alpha = b`` and ``K = k(L, L)``: the
    representer form, whose unknowns are the equations. The rows are scaled to unit variance, so
    that the nugget means the same for a boundary value and for a Laplacian; scale and nugget are
    part of what is differentiated.

    Parameters
    ----------
    kernels
        One for each field, by name.
    linearised
        ``L``, ``b``, and variances of the errors.
    nugget
        Relative to the variance of each row; the error of the mean is about its square root.
    backend
        Who factorises; by default as `choose_backend` says.
    previous
        One of the same equations linearised elsewhere: what its factor has in common with this one
        is not made again.

    Raises
    ------
    solvers.NotPositiveDefiniteError
        The nugget is too small for the kernel in this precision.

    Notes
    -----
    The functionals and alpha belong together: alpha has entries of 1e6, so coefficients that differ
    in the ninth digit give another function. What evaluates a `Posterior` uses the ones it was made
    of.
    """

    def __init__(
        self,
        kernels: Kernels,
        linearised: Linearised,
        nugget: float | Tensor = 1e-10,
        backend: Backend | None = None,
        previous: Posterior | None = None,
    ) -> None:
        self.kernels, self.linearised, self.nugget = dict(kernels), linearised, nugget
        self.backend = backend or choose_backend(self.kernels, linearised.blocks)
        rows = Representers(self.kernels, linearised.blocks)
        variances = rows.variances()
        _check_variances(variances)
        # A factor 1 / sqrt(L L k) on each row.
        self.scale = variances.rsqrt()
        self.diagonal = nugget + linearised.noise * self.scale**2
        self.target = linearised.target * self.scale
        self.rows = rows.scaled(self.scale)
        system = System(self.kernels, linearised.blocks, self.rows, self.scale, self.diagonal)
        known = None if previous is None else previous.factor
        self.factor: Factor = self.backend.factor(system, known)
        self.alpha = self.factor.solve(self.target)

    # --- the mean -----------------------------------------------------------------------------

    def evaluate(self, functionals: Rows) -> Tensor:
        """Mean of functionals, ``(m,)``: of fields by name, of the only field without one."""
        return self.factor.evaluate(self._named(functionals), self.alpha)

    def value(self, points: Tensor, field: str | None = None) -> Tensor:
        """``u`` at points ``(m, d)``: ``(m,)``."""
        return self.evaluate(self._of(field, Functionals.value_at(points)))

    def gradient(self, points: Tensor, field: str | None = None) -> Tensor:
        """``grad u``: ``(m, d)``."""
        parts = [Functionals.gradient_at(points, a) for a in range(points.shape[1])]
        return self._several(field, parts)

    def laplacian(self, points: Tensor, field: str | None = None) -> Tensor:
        """``Lap u``: ``(m,)``."""
        return self.evaluate(self._of(field, Functionals.laplacian_at(points)))

    def hessian(self, points: Tensor, field: str | None = None) -> Tensor:
        """``d_a d_b u``: ``(m, d, d)``."""
        d = points.shape[1]
        parts = [Functionals.second_at(points, a, b) for a, b in axis_pairs(d)]
        return self._several(field, parts)[:, square_of_pairs(d).to(points.device)]

    def states(self, pde: PDE) -> list[State]:
        """What the residuals of each equation of a PDE ask for, at its points."""
        return [self.state(equation) for equation in pde.equations]

    def state(self, equation: Equation) -> State:
        """What the residual of an equation asks for, at its points."""
        order, blocks = [], []
        for name, by_argument in equation.functionals().items():
            for argument, parts in by_argument.items():
                order.append((argument, len(parts)))
                blocks += [{name: part} for part in parts]
        values = self.evaluate(blocks).reshape(len(blocks), -1)
        state, start, d = {}, 0, equation.points.shape[1]
        for argument, count in order:
            part = values[start : start + count]
            start += count
            kind = equation.wanted[argument].kind
            if kind == "gradient":
                state[argument] = part.T
            elif kind == "hessian":
                state[argument] = part.T[:, square_of_pairs(d).to(part.device)]
            else:
                state[argument] = part[0]
        # In the order of the arguments, so that states of one equation have one structure.
        return {argument: state[argument] for argument in equation.wanted}

    # --- the rest of the distribution -----------------------------------------------------------

    def variance(self, functionals: Rows) -> Tensor:
        """Variance of functionals, ``(m,)``: ``k(M, M) - k(M, L) A^-1 k(L, M)``: m systems."""
        blocks = self._named(functionals)
        cross = self.factor.cross(blocks)
        return self.factor.variances(blocks) - (cross * self.factor.solve(cross.T).T).sum(-1)

    def covariance(self, functionals: Rows) -> Tensor:
        """``(m, m)``."""
        blocks = self._named(functionals)
        cross = self.factor.cross(blocks)
        return self.factor.covariances(blocks) - cross @ self.factor.solve(cross.T)

    def sample(
        self, functionals: Rows, count: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of functionals, ``(m, count)``.

        Eigenvalues of the covariance that rounding made negative count as zero.
        """
        if count < 1:
            raise ValueError(f"count={count}; expected at least 1")
        mean, covariance = self.evaluate(functionals), self.covariance(functionals)
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        normal = torch.randn(len(mean), count, generator=generator, dtype=mean.dtype)
        root = vectors * values.clamp_min(0).sqrt()
        return mean[:, None] + root @ normal.to(mean.device)

    def norm(self) -> Tensor:
        """``|u|`` in the kernels' Hilbert space: ``sqrt(alpha . K alpha)``."""
        return (self.alpha @ (self.target - self.diagonal * self.alpha)).clamp_min(0).sqrt()

    def residual(self) -> float:
        """``|b - A alpha| / |b|`` of the linear system, measured."""
        with torch.no_grad():
            image = self.factor.product(self.alpha)
            return float((self.target - image).norm() / self.target.norm().clamp_min(1e-300))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} ~ {kernel!r}" for name, kernel in self.kernels.items())
        return f"Posterior({len(self.target)} equations; {fields})"

    # --- names --------------------------------------------------------------------------------

    def _of(self, field: str | None, L: Functionals) -> dict[str, Functionals]:
        if field is None:
            if len(self.kernels) > 1:
                raise ValueError(f"which field? there are {', '.join(self.kernels)}")
            field = next(iter(self.kernels))
        if field not in self.kernels:
            raise ValueError(f"no field {field!r}; there are {', '.join(self.kernels)}")
        return {field: L}

    def _several(self, field: str | None, parts: list[Functionals]) -> Tensor:
        blocks = [self._of(field, part) for part in parts]
        return self.evaluate(blocks).reshape(len(parts), -1).T

    def _named(self, functionals: Rows) -> Blocks:
        blocks = (
            [functionals] if isinstance(functionals, (Functionals, Mapping)) else list(functionals)
        )
        return [self._of(None, L) if isinstance(L, Functionals) else L for L in blocks]


def _check_variances(variances: Tensor) -> None:
    known = variances.detach()
    if not bool((known > 0).all() & torch.isfinite(known).all()):
        bad = int(((known <= 0) | ~torch.isfinite(known)).sum())
        raise ValueError(
            f"{bad} of {len(known)} equations have no variance under the kernel (or an infinite "
            "one): at this state their residual does not depend on the fields, or not "
            "differentiably (start elsewhere than at u = 0; look for detach); or the kernel's "
            "parameters have left their range"
        )
