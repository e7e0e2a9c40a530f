"""`Nystrom`: a positive semidefinite operator seen through few products, as low rank."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from operators.linear_operator import LinearOperator, Scalar
from operators.low_rank import LowRankPlusDiagonal
from operators.randomized.sketch import (
    Columns,
    Coordinates,
    Gaussian,
    PivotedCholesky,
    Sketch,
    columns_of,
    normal,
)
from operators.tracing import readable


class Nystrom(LowRankPlusDiagonal):
    """``A_k + damping I`` with ``A_k = A O (O^T A O)^+ (A O)^T = U^T diag(l) U`` of rank k.

    The rows of U are orthonormal and ``0 <= A_k <= A``: no eigenvalue is overestimated. What O is,
    the sketch decides. ``A_k = A`` up to rounding where ``rank(A) <= k`` (for uniform coordinates,
    where those that were drawn span the range), and where k = n.

    Parameters
    ----------
    A
        Symmetric positive semidefinite operator; it must be known to be symmetric.
    rank
        k; with `tolerance`, the first k to try.
    sketch
        ``"gaussian"``: O is an orthonormal basis of random directions. ``"coordinate"``: k of the
        coordinate vectors, uniformly without replacement; misses what few coordinates carry.
        ``"rpcholesky"``: coordinates drawn in proportion to the diagonal of what is left of A
        (randomly pivoted Cholesky); near-optimal from columns alone, for kernel matrices. Stops at
        fewer than k where A is exhausted.
    damping
        ``>= 0``, one number: the multiple of I that is inside the operator.
    oversampling
        Size of the sketch beyond k; of its eigenpairs the k largest are kept.
    tolerance
        Double k until the estimate of ``|A - A_k|`` is at most this, or k is `max_rank`. The
        damping is the natural value.
    max_rank
        Largest k under `tolerance`; by default n.
    power_iterations
        Products spent on the estimate of ``|A - A_k|``, for each k that is tried; 0 for none.
    diagonal
        Diagonal of A ``(n,)`` for ``"rpcholesky"``; by default what A knows of it.
    columns
        ``i -> A[:, i]``, from indices ``(b,)`` to ``(n, b)``, where columns are cheaper than
        products, for the sketches of coordinates; by default entries of a `Dense`, products
        otherwise.
    block
        Pivots drawn at once under ``"rpcholesky"``: faster, a little less accurate than one by one.
    generator
        Of random numbers; by default one seeded with 0, so that two runs agree.

    Attributes
    ----------
    error_estimate
        Estimate of ``|A - A_k|`` (spectral norm) from below; None where none was made, and of a
        copy with other tensors.
    sketch
        As given.

    Raises
    ------
    ValueError
        A is not known to be symmetric, a product is not finite, or A turns out indefinite; a
        setting is out of range; the diagonal is needed and not known, or contradicts the columns.
    TypeError
        A is not an operator, or `diagonal` or a result of `columns` has another dtype than A.

    Warns
    -----
    RuntimeWarning
        The damping is positive but below the estimate of ``|A - A_k|``: directions that the sketch
        missed are then scaled by ``1 / damping`` instead of less. Or the tolerance was not met.

    Notes
    -----
    ``(A_k + damping I)^-1`` approximates ``(A + damping I)^-1``, not ``A^-1``.

    Costs ``k + oversampling`` products (columns), the power iterations, and ``O(n k^2)`` flops;
    under `tolerance` products are never repeated. Holds ``O(n k)`` numbers.

    U, l are constants: no derivative passes through the construction. Inside ``torch.func.vmap``
    A and the damping may vary for the sketches ``"gaussian"`` and ``"coordinate"`` with a fixed
    rank (vmap then wants ``randomness="same"``); there nothing is estimated or refused.

    Source: the shifted algorithm of Tropp, Yurtsever, Udell and Cevher (2017, arXiv:1706.05736) as
    in Frangella, Tropp and Udell (2021, arXiv:2110.02820, Algorithm 2.1), with eigenvectors of
    the core in place of its Cholesky factor, which may break down; their adaptive doubling with
    power iterations. Coordinates: Hataya and Yamada (AISTATS 2023). Pivots: Chen, Epperly, Tropp
    and Webber (2022, arXiv:2207.06503), one by one or in blocks.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.diag(torch.tensor([4.0, 1.0, 0.0])), symmetric=True)
    >>> approximation = Nystrom(A, 2, damping=0.5)
    >>> approximation.eigenvalues.round(decimals=3)
    tensor([4., 1.])
    >>> (approximation.inverse() @ torch.tensor([9.0, 3.0, 1.0])).round(decimals=3)
    tensor([2., 2., 2.])
    """

    # It is of the A that was sketched, and so of no copy with other tensors.
    _transient = ("error_estimate",)
    error_estimate: float | None = None

    def __init__(
        self,
        A: LinearOperator,
        rank: int,
        *,
        sketch: Literal["gaussian", "coordinate", "rpcholesky"] = "gaussian",
        damping: Scalar = 0.0,
        oversampling: int = 0,
        tolerance: float | None = None,
        max_rank: int | None = None,
        power_iterations: int = 5,
        diagonal: Tensor | None = None,
        columns: Columns | None = None,
        block: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        damping = _check_arguments(A, damping, tolerance, power_iterations)
        n = A.shape[0]
        limit = rank if tolerance is None else (n if max_rank is None else max_rank)
        if tolerance is None and max_rank is not None:
            raise ValueError(f"max_rank={max_rank} without tolerance; the rank is then fixed")
        if not 1 <= rank <= limit <= n:
            raise ValueError(f"rank={rank} and max_rank={max_rank}; expected 1 <= rank <= {n}")
        if oversampling < 0 or block < 1:
            raise ValueError(
                f"oversampling={oversampling} and block={block}; expected >= 0 and >= 1"
            )
        if generator is None:
            generator = torch.Generator(A.device).manual_seed(0)
        with torch.no_grad():
            A.check_claims()
            columns = columns_of(A, columns)
            sketched: Sketch
            if sketch == "rpcholesky":
                sketched = PivotedCholesky(A, diagonal, columns, block, generator)
            elif sketch == "gaussian":
                sketched = Gaussian(A, generator)
            elif sketch == "coordinate":
                sketched = Coordinates(A, columns, generator)
            else:
                raise ValueError(
                    f"sketch={sketch!r}; expected 'gaussian', 'coordinate' or 'rpcholesky'"
                )
            while True:
                sketched.extend(min(rank + oversampling, n))
                rows, weights = (part[:rank].to(A.dtype).detach() for part in sketched.eigenpairs())
                error = _error(A, rows, weights, power_iterations, generator)
                if tolerance is None or (error is not None and error <= tolerance) or rank == limit:
                    break
                rank = min(2 * rank, limit)
        super().__init__(rows, damping, weights, space=A.domain)
        self.sketch, self.error_estimate = sketch, error
        if error is None:
            return
        if tolerance is not None and error > tolerance:
            _warn(f"|A - A_k| is about {error:.3g} at max_rank={rank}; tolerance={tolerance:.3g}")
        value = float(self.damping.detach()) if readable(self.damping) else 0.0
        if 0 < value < error:
            _warn(
                f"damping={value:.3g} is below |A - A_k|, about {error:.3g} at rank "
                f"{rank}; raise the rank (tolerance=damping does so) or the damping"
            )

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues ``l`` of ``A_k``, descending."""
        return self.weights

    @property
    def damping(self) -> Tensor:
        """The multiple of the identity that is inside the operator."""
        return self.diagonal_values

    def inverse(self) -> LowRankPlusDiagonal:
        """``(A_k + r I)^-1 = I / r - U^T diag(l / (r (l + r))) U`` for damping r.

        Raises
        ------
        ValueError
            The damping is zero: the matrix is singular unless k = n.
        """
        damping, eigenvalues = self.damping, self.eigenvalues
        if readable(damping) and not bool(damping > 0):
            raise ValueError(
                f"{self!r} has damping={float(damping)}; its inverse needs damping > 0"
            )
        # The rows are orthonormal, so this is exact without a small system to factorise.
        weights = -eigenvalues / (damping * (eigenvalues + damping))
        structure = self.structure.inverse()
        return self._derived(self.rows, 1 / damping, weights, self.domain, structure)


def _error(
    A: LinearOperator, rows: Tensor, weights: Tensor, iterations: int, generator: torch.Generator
) -> float | None:
    """``|(A - A_k) v|`` for a unit v of the power method: at most the norm, and close to it."""
    if iterations == 0 or not readable(rows):
        return None
    v = normal(A, 1, generator)
    norm = v.norm()
    for _ in range(iterations):
        if not bool(norm > 0):
            break
        v = v / norm
        v = A._matmat(v) - rows.T @ (weights[:, None] * (rows @ v))
        norm = v.norm()
    return float(norm)


def _check_arguments(
    A: LinearOperator, damping: Scalar, tolerance: float | None, power_iterations: int
) -> Tensor:
    if not isinstance(A, LinearOperator):
        raise TypeError(f"A is a {type(A).__name__}; expected a LinearOperator, as Dense(matrix)")
    if not A.symmetric:
        raise ValueError(
            f"{A!r} is not known to be symmetric; expected a symmetric positive semidefinite "
            "operator: make the claim where it was made, as Dense(matrix, symmetric=True)"
        )
    if power_iterations < 0 or (tolerance is not None and power_iterations == 0):
        raise ValueError(
            f"power_iterations={power_iterations}; expected >= 0, and > 0 under a tolerance"
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}; expected > 0")
    if tolerance is not None and not readable(*A.tensors):
        raise ValueError("tolerance reads the error to choose the rank; it cannot inside vmap")
    value = torch.as_tensor(damping, dtype=A.dtype, device=A.device)
    if value.ndim != 0 or (readable(value) and not bool(value >= 0)):
        raise ValueError(f"damping={damping}; expected one number >= 0")
    return value


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
