"""The Lanczos process with full reorthogonalisation, for a block of starting vectors at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators.linear_operator import LinearOperator
from operators.randomized.monte_carlo import check_count
from operators.tracing import readable


@dataclass(frozen=True, eq=False)
class Tridiagonals:
    """``A Q = Q T + r q e_k^T`` for each of p starting vectors, Q orthonormal with first column z.

    Where column i found an invariant subspace after ``steps[i] < k`` steps, the decomposition is
    exact there: later rows of its basis are zero, and T is padded with its first diagonal entry,
    uncoupled, so that ``e_1^T f(T) e_1`` is the same with and without the padding.

    Parameters
    ----------
    diagonal
        ``(p, k)``.
    off_diagonal
        ``(p, k - 1)``, nonnegative.
    basis
        ``(p, k, n)``: rows are the columns of Q.
    remainder
        ``r >= 0``, of shape ``(p,)``; zero where the Krylov space is invariant.
    norms
        Norms of the starting vectors, ``(p,)``.
    steps
        Steps until the space was invariant, or k; ``(p,)``, integers.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor
    remainder: Tensor
    norms: Tensor
    steps: Tensor

    def to_dense(self, steps: int | None = None) -> Tensor:
        """The matrices T ``(p, k, k)``, or those after fewer steps."""
        k = self.diagonal.shape[1] if steps is None else steps
        side = self.off_diagonal[:, : k - 1]
        return (
            torch.diag_embed(self.diagonal[:, :k])
            + torch.diag_embed(side, 1)
            + torch.diag_embed(side, -1)
        )


def lanczos(
    A: LinearOperator, block: Tensor, steps: int, *, image: Tensor | None = None
) -> Tridiagonals:
    """Tridiagonal ``T = Q^T A Q`` on the Krylov spaces of the columns of `block`.

    The p processes are independent (this is not block Lanczos); they share the products, one block
    ``(n, p)`` a step.

    Parameters
    ----------
    A
        Symmetric operator; it must be known to be symmetric.
    block
        Starting vectors ``(n, p)``, none of them zero.
    steps
        k; at most n are done.
    image
        ``A block``, where it is at hand; saves the first product.

    Raises
    ------
    ValueError
        A is not known to be symmetric; the shape of `block` or `image` does not fit; a starting
        vector is zero; a product is not finite; `steps` is not positive.
    TypeError
        A is no operator, or `block` or `image` has another dtype or device.

    Notes
    -----
    Costs k products with blocks and ``4 n p k^2`` flops: every vector is orthogonalised twice
    against all earlier ones, which keeps Q orthonormal to rounding (Parlett, 1980, section 6.9) and
    T free of copies of converged eigenvalues. Holds ``n p k`` numbers. The space is taken for
    invariant where the next vector is at rounding level, ten eps times the largest column of T.

    Everything it returns is a constant for differentiation.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Diagonal(torch.tensor([1.0, 1.0, 3.0]))
    >>> T = lanczos(A, torch.ones(3, 1), steps=3)
    >>> T.steps  # two distinct eigenvalues
    tensor([2])
    >>> torch.linalg.eigvalsh(T.to_dense(2)).round(decimals=4)
    tensor([[1., 3.]])
    """
    _check(A, block, steps, image)
    A.check_claims()
    n, p = block.shape
    k = min(steps, n)
    with torch.no_grad():
        norms = block.detach().norm(dim=0)
        if readable(norms) and not bool(((norms > 0) & (norms < torch.inf)).all()):
            raise ValueError("a column of block is zero or not finite; expected a direction")
        q = block.detach() / norms
        w = A._matmat(q) if image is None else image.detach() / norms
        basis = w.new_zeros(p, k, n)
        diagonal: list[Tensor] = []
        off_diagonal: list[Tensor] = []
        running: list[Tensor] = []
        alive = torch.ones_like(norms, dtype=torch.bool)
        scale = beta = torch.zeros_like(norms)
        for step in range(k):
            if step:
                w = A._matmat(q)
            basis[:, step] = q.T
            alpha = (q * w).sum(0)
            residual = w.T
            for _ in range(2):
                residual = _orthogonalised(residual, basis[:, : step + 1])
            running.append(alive)
            diagonal.append(torch.where(alive, alpha, diagonal[0] if step else alpha))
            previous, beta = beta, residual.norm(dim=1)
            scale = torch.maximum(scale, alpha.abs() + beta + previous)
            alive = alive & (beta > 10 * torch.finfo(A.dtype).eps * scale)
            beta = torch.where(alive, beta, 0)
            q = torch.where(alive, residual.T / torch.where(alive, beta, 1), 0)
            off_diagonal.append(beta)
        alphas, betas = torch.stack(diagonal, dim=-1), torch.stack(off_diagonal, dim=-1)
        if readable(alphas, scale) and not bool(torch.isfinite(alphas.sum(1) + scale).all()):
            raise ValueError(f"a product with {A!r} is not finite")
        counts = torch.stack(running).sum(0)
        # Forward mode does not heed no_grad.
        return Tridiagonals(
            alphas.detach(),
            betas[:, :-1].detach(),
            basis.detach(),
            betas[:, -1].detach(),
            norms,
            counts,
        )


def _orthogonalised(residual: Tensor, bases: Tensor) -> Tensor:
    """Rows ``r - Q^T Q r``, each by its own rows Q ``(k, n)``."""
    # A batched product with single columns would take torch ten times as long on a CPU.
    pairs = zip(bases, residual, strict=True)
    return torch.stack([r - Q.T @ (Q @ r) for Q, r in pairs])


def _check(A: LinearOperator, block: Tensor, steps: int, image: Tensor | None) -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(f"A is a {type(A).__name__}; expected a LinearOperator")
    if not A.symmetric:
        raise ValueError(
            f"{A!r} is not known to be symmetric, which the Lanczos process needs; claim it "
            "where it is built (symmetric=True or positive_definite=True)"
        )
    check_count("steps", steps, 1)
    for name, tensor in (("block", block), ("image", image)):
        if tensor is None:
            continue
        if tensor.dtype != A.dtype or tensor.device != A.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}; expected {A.dtype} on {A.device}"
            )
        if tensor.ndim != 2 or tensor.shape[0] != A.shape[0] or tensor.shape != block.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected ({A.shape[0]}, p), p > 0"
            )
    if 0 in block.shape:
        raise ValueError(f"block has shape {tuple(block.shape)}; expected a vector to start from")
