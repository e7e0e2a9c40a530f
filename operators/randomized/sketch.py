"""Sketches of a positive semidefinite operator: few products or columns, turned into eigenpairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from operators.claims import rounding
from operators.elementary import Dense
from operators.linear_operator import LinearOperator
from operators.precision import in_single
from operators.tracing import readable

Columns = Callable[[Tensor], Tensor]

# Sketches are factorised in float64 whatever the operator's dtype. In float32 the error of the
# approximation would be ten times the rounding of the entries; the inverse divides it by damping.
WIDE = torch.float64


class Sketch(Protocol):
    """What was seen of an operator A so far; it grows without repeating a product."""

    def extend(self, size: int) -> None:
        """See `size` directions in all."""

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors of the Nystrom approximation, as orthonormal rows, and its eigenvalues."""


class Projection:
    """``Y = A O`` for orthonormal O, and the eigenpairs of ``Y (O^T Y)^+ Y^T``."""

    def __init__(self, A: LinearOperator) -> None:
        self.A = A
        self.test = torch.zeros(A.shape[0], 0, dtype=A.dtype, device=A.device)
        self.image = self.test

    def extend(self, size: int) -> None:
        """Take `size` directions in all."""
        raise NotImplementedError

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Orthonormal rows and their eigenvalues, descending."""
        test, image = self.test.to(WIDE), self.image.to(WIDE)
        eps = torch.finfo(self.A.dtype).eps * image.norm()
        root, shift = _inverse_root(test.T @ image, eps, self.A)
        # A + shift I is what is approximated; the shift is taken off the eigenvalues again.
        rows, eigenvalues = _left_eigenpairs((image + shift * test) @ root)
        return rows, (eigenvalues - shift).clamp_min(0)


class Gaussian(Projection):
    """O is an orthonormal basis of random directions."""

    def __init__(self, A: LinearOperator, generator: torch.Generator) -> None:
        super().__init__(A)
        self.generator = generator

    def extend(self, size: int) -> None:
        """Take `size` directions in all."""
        fresh = normal(self.A, size - self.test.shape[1], self.generator)
        # Once is enough: what is left of a random block is not small.
        fresh = in_single(torch.linalg.qr, fresh - self.test @ (self.test.T @ fresh)).Q
        self.test = torch.cat([self.test, fresh], dim=1)
        self.image = torch.cat([self.image, self.A._matmat(fresh)], dim=1)


class Coordinates(Projection):
    """O holds coordinate vectors, uniformly without replacement."""

    def __init__(self, A: LinearOperator, columns: Columns, generator: torch.Generator) -> None:
        super().__init__(A)
        self.columns = columns
        order = torch.randperm(A.shape[0], generator=generator, device=generator.device)
        self.order = order.to(A.device)

    def extend(self, size: int) -> None:
        """Take `size` directions in all."""
        fresh = self.order[self.test.shape[1] : size]
        self.test = torch.cat([self.test, _coordinate_vectors(self.A, fresh)], dim=1)
        self.image = torch.cat([self.image, self.columns(fresh)], dim=1)


class PivotedCholesky:
    """``A ~ F F^T`` by randomly pivoted partial Cholesky, and its eigenpairs."""

    def __init__(
        self,
        A: LinearOperator,
        diagonal: Tensor | None,
        columns: Columns,
        block: int,
        generator: torch.Generator,
    ) -> None:
        known = A._exact_diagonal() if diagonal is None else diagonal
        if known is None:
            raise ValueError(
                f"{A!r} does not know its diagonal, which sketch='rpcholesky' needs; "
                "give diagonal=, or take sketch='gaussian'"
            )
        if known.shape != (A.shape[0],):
            raise ValueError(f"diagonal has shape {tuple(known.shape)}; expected ({A.shape[0]},)")
        if known.dtype != A.dtype or known.device != A.device:
            raise TypeError(
                f"diagonal is {known.dtype} on {known.device}; expected {A.dtype} on {A.device}"
            )
        if not readable(known):
            raise ValueError("sketch='rpcholesky' reads its pivots; it cannot run inside vmap")
        self.A, self.columns, self.block, self.generator = A, columns, block, generator
        self.factor = torch.zeros(A.shape[0], 0, dtype=WIDE, device=A.device)
        self.left = known.to(WIDE, copy=True)  # diagonal of A - F F^T, updated in place
        self.scale = float(self.left.abs().max())
        self.eps = torch.finfo(A.dtype).eps
        self._check_left()

    def extend(self, size: int) -> None:
        """Go on to `size` columns of F, or to where A is exhausted."""
        done = self.factor.shape[1]
        factor = self.factor.new_zeros(self.factor.shape[0], size)
        factor[:, :done] = self.factor
        while done < size:
            # What is left there is rounding: a pivot on it would only add noise.
            self.left[self.left <= 10 * self.eps * self.scale] = 0
            if not bool((self.left > 0).any()):
                break
            pivots = self._draw(min(self.block, size - done))
            seen = factor[:, :done] @ factor[pivots, :done].T
            column = self.columns(pivots).to(WIDE) - seen
            core = column[pivots]
            self._check_pivots(core.diagonal(), self.left[pivots])
            # The published shift, eps tr(core), is below the rounding of products in float32.
            root, _ = _inverse_root(core, self.left.new_tensor(self.eps * self.scale), self.A)
            new = column @ root
            factor[:, done : done + len(pivots)] = new
            self.left -= new.square().sum(1)
            self.left[pivots] = 0
            self._check_left()
            done += len(pivots)
        self.factor = factor[:, :done]

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Orthonormal rows and their eigenvalues, descending."""
        return _left_eigenpairs(self.factor)

    def _draw(self, count: int) -> Tensor:
        # Through the distribution function: torch.multinomial stops at 2^24 categories.
        cumulative = self.left.cumsum(0)
        device = self.generator.device
        uniform = torch.rand(count, generator=self.generator, dtype=WIDE, device=device)
        drawn = torch.searchsorted(
            cumulative, uniform.to(cumulative.device) * cumulative[-1], right=True
        )
        return drawn.clamp_max(len(cumulative) - 1).unique()

    def _check_pivots(self, found: Tensor, expected: Tensor) -> None:
        if not bool((found - expected).abs().max() <= self.eps**0.5 * self.scale):
            raise ValueError(
                f"the diagonal of {self.A!r} says {float(expected[0]):.6g} where its column says "
                f"{float(found[0]):.6g} (what was removed so far deducted); check diagonal= and "
                "columns=, or A is not finite"
            )

    def _check_left(self) -> None:
        if not bool(self.left.min() >= -10 * self.eps**0.5 * self.scale):
            raise ValueError(
                f"{self.A!r} is not positive semidefinite: the diagonal of a Schur complement has "
                f"the entry {float(self.left.min()):.3g}; expected a positive semidefinite operator"
            )


def _inverse_root(core: Tensor, eps: Tensor, A: LinearOperator) -> tuple[Tensor, Tensor]:
    """W with ``W W^T = (C + s I)^-1``, and s, the shift of the order of rounding."""
    if readable(core) and not bool(torch.isfinite(core).all()):
        raise ValueError(f"a product with {A!r} is not finite")
    eigenvalues, vectors = torch.linalg.eigh((core + core.T) / 2)
    smallest = eigenvalues[0]
    # Products carry more than one rounding each.
    allowed = rounding(A.dtype) / torch.finfo(A.dtype).eps * eps
    if readable(smallest) and bool(smallest < -allowed):
        raise ValueError(
            f"{A!r} is not positive semidefinite: <v, A v> = {float(smallest):.3g} for a unit "
            "vector v of the sketch; expected a positive semidefinite operator (a Gauss-Newton or "
            "Fisher matrix instead of a Hessian, or A + damping * Identity)"
        )
    # The least normal number keeps the root of a zero operator finite.
    floor = eps.clamp_min(torch.finfo(WIDE).tiny)
    shift = floor + 2 * (-smallest).clamp_min(0)
    # Not the symmetric root: rotated back, the column of a tiny eigenvalue would spill its rounding
    # errors, enlarged by the inverse root, over all the others.
    return vectors / (eigenvalues + shift).sqrt(), shift


def _left_eigenpairs(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (as rows) and eigenvalues of ``F F^T``, descending."""
    basis, triangle = torch.linalg.qr(factor)
    vectors, values, _ = torch.linalg.svd(triangle)
    return (basis @ vectors[:, : len(values)]).T, values.square()


def columns_of(A: LinearOperator, given: Columns | None = None) -> Columns:
    """``i -> A[:, i]``: as given, else entries where they are held, else products."""
    if given is None and isinstance(A, Dense):
        return lambda index: A.matrix[:, index]
    if given is None:
        return lambda index: A._matmat(_coordinate_vectors(A, index))

    def checked(index: Tensor) -> Tensor:
        block = given(index)
        if block.shape != (A.shape[0], len(index)):
            raise ValueError(
                f"columns gave shape {tuple(block.shape)} for {len(index)} indices; "
                f"expected ({A.shape[0]}, {len(index)})"
            )
        if block.dtype != A.dtype or block.device != A.device:
            raise TypeError(
                f"columns gave {block.dtype} on {block.device}; expected {A.dtype} on {A.device}"
            )
        return block

    return checked


def _coordinate_vectors(A: LinearOperator, index: Tensor) -> Tensor:
    vectors = torch.zeros(A.shape[0], len(index), dtype=A.dtype, device=A.device)
    vectors[index, torch.arange(len(index), device=A.device)] = 1
    return vectors


def normal(A: LinearOperator, count: int, generator: torch.Generator) -> Tensor:
    """Standard normal block ``(n, count)``, drawn on the device of the generator."""
    shape, device = (A.shape[0], count), generator.device
    return torch.randn(shape, generator=generator, dtype=A.dtype, device=device).to(A.device)
