"""`KLFactor`: a sparse approximate inverse factor of a kernel matrix, used in its place."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from operators import LinearOperator
from operators.closures import closure_of
from operators.hidden_tensors import refuse_hidden_tensors
from operators.tracing import differentiating, outside, plain_values
from solvers.kernel.kl_columns import columns_of
from solvers.kernel.kl_pattern import KLPattern, pattern_tensor
from solvers.kernel.triangle import Kind, Triangle, applied
from solvers.solution import StructureError

INSIDE_VMAP = "KLFactor: torch.func.vmap maps over a tensor of A; factorise one by one"


class KLFactor:
    """U, sparse and upper triangular in an order from coarse to fine, with ``A^-1 ~ U U^T``.

    The matrix ``(U U^T)^-1`` stands for A in all that a Gaussian process asks of it: solves,
    products, the determinant, samples. They are consistent with each other, and exact for it;
    only U itself approximates. All are differentiable with respect to the tensors of A and to
    their argument, in reverse mode, any number of times (``vmap`` and forward mode are not there).

    Parameters
    ----------
    A
        Symmetric positive definite operator with `operators.LinearOperator.submatrix`.
    pattern
        For its functionals.
    nugget
        U is that of ``A + nugget diag(A)``.

    Raises
    ------
    StructureError
        A is not known to be symmetric.
    ValueError
        The pattern has another size than A; or, where a derivative is under way, a function inside
        A closes over a tensor that is differentiated.
    NotPositiveDefiniteError
        A small Gram matrix is not positive definite to working precision.
    TypeError
        A has no cheap entries.

    Notes
    -----
    Costs ``O(n rho^(2 d))`` evaluations, ``O(n rho^(3 d))`` flops and ``O(n rho^d)`` numbers once,
    and ``4 nnz`` flops for each column of a product or solve. A derivative evaluates and factorises
    again, about three times the cost of making U, in the memory of the values (see
    `solvers.kernel.kl_columns.columns_of`). Products and solves run on the CPU, on one core. Claims
    about A are not tried by products with it, which would cost more than all of this; that a small
    matrix is not definite is found out anyway.
    """

    def __init__(self, A: LinearOperator, pattern: KLPattern, nugget: float = 0.0) -> None:
        if not A.symmetric:
            raise StructureError(
                f"KLFactor needs a symmetric operator; {A!r} does not claim to be: claim it"
            )
        if A.shape[0] != pattern.size:
            raise ValueError(f"pattern has {pattern.size} functionals for {A!r}")
        if differentiating():
            refuse_hidden_tensors(A, closure_of(A))
        self.A, self.pattern, self.nugget = A, pattern, nugget
        self.values = columns_of(A, pattern, nugget)

    @cached_property
    def numbers(self) -> Triangle:
        """U as plain numbers, for products on the CPU."""
        plain = plain_values(self.values, INSIDE_VMAP)
        with outside():
            return Triangle(self.pattern, plain)

    @property
    def factor_nonzeros(self) -> int:
        """Nonzeros of U."""
        return self.pattern.nnz

    @property
    def rho(self) -> float:
        """Width of the balls, in lengths of their columns; see `KLPattern.of`."""
        return self.pattern.rho

    def update(self, A: LinearOperator) -> KLFactor:
        """The same for another operator of these functionals: order and pattern are kept."""
        return KLFactor(A, self.pattern, self.nugget)

    def solve(self, b: Tensor) -> Tensor:
        """``U U^T b ~ A^-1 b`` for ``(n,)`` or ``(n, k)``."""
        self._check(b, "b")
        return self._through(b, "U^T", "U")

    def product(self, v: Tensor) -> Tensor:
        """``U^-T U^-1 v ~ A v`` for ``(n,)`` or ``(n, k)``: two triangular systems."""
        self._check(v, "v")
        return self._through(v, "U^-1", "U^-T")

    def logdet(self) -> Tensor:
        """``-2 sum_j log U_jj ~ log det A``."""
        places = pattern_tensor(self.pattern.diagonal, self.values.device)
        return -2 * self.values[places].log().sum()

    def inverse_diagonal(self) -> Tensor:
        """``diag(U U^T) ~ diag(A^-1)``, ``(n,)``: what leave-one-out errors are divided by."""
        rows = torch.from_numpy(self.pattern.indices).to(self.values.device)
        total = self.values.new_zeros(self.pattern.size)
        return self._restored(total.index_add(0, rows, self.values.square()))

    def sample(self, generator: torch.Generator | None = None, count: int | None = None) -> Tensor:
        """``U^-T z`` with standard normal z: of covariance ``(U U^T)^-1 ~ A``.

        Parameters
        ----------
        generator
            Of z; by default torch's own.
        count
            Number of samples, as columns ``(n, count)``; by default one, ``(n,)``.
        """
        shape = (self.A.shape[0],) if count is None else (self.A.shape[0], count)
        device = self.values.device if generator is None else generator.device
        z = torch.randn(shape, generator=generator, dtype=self.values.dtype, device=device)
        return self._restored(applied(self.numbers, self.values, z.to(self.values), "U^-T"))

    def whiten(self, v: Tensor) -> Tensor:
        """``U^T v``, which has covariance I where v has A; ``|U^T v|^2 ~ v^T A^-1 v``.

        ``(n,)`` or ``(n, k)``, in the order of places.
        """
        self._check(v, "v")
        return applied(self.numbers, self.values, self._ordered(v), "U^T")

    def to_scipy(self) -> Any:
        """U as a scipy CSC array in the order of places: ``U[i, j]`` belongs to ``order[i]``."""
        return self.numbers.sorted

    def _through(self, v: Tensor, first: Kind, second: Kind) -> Tensor:
        image = applied(self.numbers, self.values, self._ordered(v), first)
        return self._restored(applied(self.numbers, self.values, image, second))

    def _ordered(self, v: Tensor) -> Tensor:
        return v[pattern_tensor(self.pattern.order, v.device)]

    def _restored(self, v: Tensor) -> Tensor:
        return v[pattern_tensor(self.pattern.inverse_order, v.device)]

    def _check(self, v: Tensor, name: str) -> None:
        n = self.pattern.size
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"{name} has shape {tuple(v.shape)}; expected ({n},) or ({n}, k)")
        if (v.dtype, v.device) != (self.values.dtype, self.values.device):
            raise TypeError(
                f"{name} is {v.dtype} on {v.device}; expected {self.values.dtype} on "
                f"{self.values.device}"
            )

    def __repr__(self) -> str:
        per_column = self.factor_nonzeros / max(1, self.pattern.size)
        return (
            f"KLFactor({self.pattern.size}, rho={self.rho:g}, {self.factor_nonzeros} nonzeros, "
            f"{per_column:.1f} a column)"
        )
