"""Cheap tests that refute a false claim about an operator: a promise is tried, not believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from operators.tracing import readable

if TYPE_CHECKING:
    from operators.linear_operator import LinearOperator

# Dimension of the Krylov space that tries a definiteness claim; symmetry needs two.
STEPS = 8


class FalseClaimError(ValueError):
    """An operator lacks a structure that was claimed of it."""


def rounding(dtype: torch.dtype) -> float:
    """Relative difference of two entries that rounding explains: ``min(100 eps, sqrt(eps))``.

    A sum of k products gathers about ``sqrt(k) eps``: a hundred eps leaves room for k = 10^4. In
    half precision that would be as much as the entries themselves, so half of the digits count.
    """
    eps = torch.finfo(dtype).eps
    return float(min(100 * eps, eps**0.5))


def refute(A: LinearOperator, claims: tuple[str, ...]) -> bool:
    """Raise `FalseClaimError` where a random test contradicts one of the claims.

    With an orthonormal basis Q of a random Krylov space, ``H = Q^T A Q`` inherits symmetry and
    definiteness, and its smallest eigenvalue is far below that of a random ``<v, A v>``: for
    n <= 8 it is that of A. Deviations below ``sqrt(eps)``, relative to the largest entry, pass as
    rounding: an operator that is singular, or nearly so, passes for positive definite, and a solver
    meets the pivot that is not positive. So do products that are not finite, which are another
    matter than structure.

    Returns
    -------
    bool
        False where the values cannot be read now (inside ``torch.func.vmap``).
    """
    n = A.shape[1]
    if n == 0:
        return True
    tolerance = float(torch.finfo(A.dtype).eps) ** 0.5
    with torch.no_grad():
        if "linear" in claims:
            u, v = _random(A, n), _random(A, n, seed=1)
            images = [A._matvec(u), A._matvec(v), A._matvec(2 * u + v)]
            if not readable(*images):
                return False
            # In double precision, where the squares of single precision are numbers still.
            first, second, together = (image.double() for image in images)
            gap = 2 * first + second - together
            if bool(_norm(gap) > tolerance * _norm(together)):
                raise FalseClaimError(
                    f"{A!r}: its matvec is not linear: A (2u + v) and 2 A u + A v differ by "
                    f"{float(_norm(gap) / _norm(together)):.3g} of their norm"
                )
        spectral = {"symmetric", "positive_semidefinite", "positive_definite"}.intersection(claims)
        if spectral:
            H = _projection(A, min(n, 2 if spectral == {"symmetric"} else STEPS))
            if H is None:
                return False
            if not bool(torch.isfinite(H).all()):
                return True
            _refute_spectral(A, spectral, H.double(), tolerance)
        for claim, lower in (("lower_triangular", True), ("upper_triangular", False)):
            if claim not in claims and "diagonal" not in claims:
                continue
            cuts = sorted({1 + (n - 2) * i // (STEPS - 1) for i in range(STEPS)} & set(range(1, n)))
            for cut in cuts:
                # A lower triangle maps what vanishes before the cut to the like.
                v = _random(A, n)
                before = torch.arange(n, device=A.device) < cut
                image = A._matvec(torch.where(before if lower else ~before, 0.0, v))
                if not readable(image):
                    return False
                spilt = image[before if lower else ~before].abs().max()
                if bool(spilt > tolerance * image.abs().max()):
                    name = claim if claim in claims else "diagonal"
                    side = "above" if lower else "below"
                    raise _false(A, name, f"entries {side} the diagonal give {float(spilt):.3g}")
        if "adjoint" in claims:
            u, v = _random(A, A.shape[0], seed=1), _random(A, n)
            forward, backward = A._matvec(v), A._rmatvec(u)
            if not readable(forward, backward):
                return False
            u, v, forward, backward = (w.double() for w in (u, v, forward, backward))
            left, right = float(u @ forward), float(backward @ v)
            scale = float(_norm(u) * _norm(forward) + _norm(backward) * _norm(v))
            if abs(left - right) > tolerance * scale:
                raise _false(A, "adjoint", f"<u, A v> = {left:.6g} but <A^T u, v> = {right:.6g}")
    return True


def _projection(A: LinearOperator, steps: int) -> Tensor | None:
    """``Q^T A Q`` for a Krylov space of a random vector, by Gram-Schmidt done twice."""
    basis: list[Tensor] = []
    images: list[Tensor] = []
    candidate = _random(A, A.shape[1])
    for step in range(steps):
        for retry in range(3):
            norm = candidate.norm()
            for _ in range(2):
                for q in basis:
                    candidate = candidate - (q @ candidate) * q
            # An invariant subspace ends the sequence early: go on from another random vector.
            if bool(candidate.norm() > 1e-3 * norm):
                break
            candidate = _random(A, A.shape[1], seed=1 + 3 * step + retry)
        basis.append(candidate / candidate.norm())
        image = A._matvec(basis[-1])
        if not readable(image):
            return None
        images.append(image)
        candidate = image
    return torch.stack(basis) @ torch.stack(images).T


def _refute_spectral(A: LinearOperator, claims: set[str], H: Tensor, tolerance: float) -> None:
    scale = float(H.abs().max())
    asymmetry = float((H - H.T).abs().max())
    strongest_first = ("positive_definite", "positive_semidefinite", "symmetric")
    name = next(claim for claim in strongest_first if claim in claims)
    if asymmetry > tolerance * scale:
        raise _false(A, name, f"<u, A v> and <A u, v> differ by {asymmetry:.3g} for unit u and v")
    if name == "symmetric":
        return
    smallest = float(torch.linalg.eigvalsh((H + H.T) / 2)[0])
    if smallest < -tolerance * scale:
        raise _false(A, name, f"<v, A v> = {smallest:.3g} for a unit vector v")
    if name == "positive_definite" and scale == 0.0:
        raise _false(A, name, "<v, A v> = 0 for every vector v that was tried")


def _norm(v: Tensor) -> Tensor:
    """``|v|``, also where the squares of its entries leave the range of the dtype."""
    largest = v.abs().max() if v.numel() else v.new_zeros(())
    return largest * (v / torch.where(largest > 0, largest, 1.0)).norm()


def _random(A: LinearOperator, size: int, seed: int = 0) -> Tensor:
    # numpy's generator: torch's refuses to draw inside vmap, and the global one is the user's.
    sample = np.random.default_rng(seed).standard_normal(size)
    return torch.from_numpy(sample).to(dtype=A.dtype, device=A.device)


def _false(A: LinearOperator, claim: str, evidence: str) -> FalseClaimError:
    return FalseClaimError(
        f"{A!r} is claimed {claim.replace('_', ' ')} ({claim}=True), but {evidence}; drop the claim"
        if claim != "adjoint"
        else f"{A!r}: rmatvec, or what autograd makes of matvec, is not the transpose: {evidence}"
    )
