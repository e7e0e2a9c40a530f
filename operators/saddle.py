"""`Saddle`: the operator of a saddle-point (Karush-Kuhn-Tucker) system."""

from __future__ import annotations

from operators.algebra import Gram
from operators.block import Block, diagonal_blocks, of_one_kind
from operators.linear_operator import LinearOperator, Scalar
from operators.structure import Structure


class Saddle(Block):
    """``A = [[B, G^T], [G, -C]]`` on pairs (primal, dual): the matrix of a saddle-point problem.

    Parameters
    ----------
    B
        Square operator on the primal space, as the Hessian of a Lagrangian.
    G
        From the primal to the dual space, as the Jacobian of constraints.
    C
        Square operator on the dual space, as a regularisation; by default zero.

    Raises
    ------
    ValueError
        The operators do not fit together.
    TypeError
        One is not an operator, or they differ in dtype or device.

    Notes
    -----
    A is symmetric where B and C are, and indefinite where B is positive definite, C semidefinite
    and G not zero: by ``A = L diag(B, -S) L^T`` it then has as many negative eigenvalues as the
    Schur complement ``S = C + G B^-1 G^T`` has positive ones (Benzi, Golub and Liesen, 2005, Acta
    Numerica 14, section 3, doi:10.1017/S0962492904000212). A product costs one with each of B, G,
    G^T and C. Multiples, and sums with a diagonal or two diagonal blocks, are of the form again.

    Examples
    --------
    >>> import torch, operators as ops
    >>> G = ops.Dense(torch.tensor([[1.0, 1.0]]))
    >>> A = Saddle(2.0 * ops.Identity(2), G)
    >>> A @ (torch.tensor([1.0, 2.0]), torch.tensor([3.0]))
    (tensor([5., 7.]), tensor([3.]))
    >>> A.schur_complement(0.5 * ops.Identity(2)).to_dense()
    tensor([[1.]])
    """

    # G^T is made when used, so that it follows G wherever the tensors of A are replaced.
    _parameters = ("B", "G", "C")

    def __init__(
        self, B: LinearOperator, G: LinearOperator, C: LinearOperator | None = None
    ) -> None:
        given = of_one_kind([B, G] if C is None else [B, G, C], "operator")
        self.B, self.G = given[:2]
        self.C = None if C is None else given[2]
        self._join()

    def _facts(self) -> Structure:
        return Structure(symmetric=self.B.symmetric and (self.C is None or self.C.symmetric))

    @property
    def saddle(self) -> bool:
        """True: it is held as ``[[B, G^T], [G, -C]]``."""
        return True

    @property
    def rows(self) -> tuple[tuple[LinearOperator | None, ...], ...]:
        """``((B, G^T), (G, -C))``, with None for a C of zeros."""
        return (self.B, self.G.T), (self.G, None if self.C is None else -self.C)

    def schur_complement(self, inverse_of_B: LinearOperator) -> LinearOperator:
        """``S = C + G B^-1 G^T`` on the dual space, with ``S y = G B^-1 f - g``.

        Parameters
        ----------
        inverse_of_B
            ``B^-1``, or an approximation of it: S is then one of the Schur complement.

        Raises
        ------
        ValueError
            It does not have the shape of B.
        TypeError
            It is not an operator, or has another dtype or device.

        Notes
        -----
        Symmetric and semidefinite where ``B^-1`` and C are known to be, and definite where C is.
        A product costs one with each of G, ``B^-1``, G^T and C.
        """
        inverse_of_B, _ = of_one_kind([inverse_of_B, self.B], "operator")
        if inverse_of_B.shape != self.B.shape:
            raise ValueError(
                f"inverse_of_B is {inverse_of_B!r}, but B is {self.B!r}; expected one shape"
            )
        gram = Gram(self.G.T, inverse_of_B)
        return gram if self.C is None else self.C + gram

    def _transpose(self) -> LinearOperator:
        return Saddle(self.B.T, self.G, None if self.C is None else self.C.T)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        blocks = diagonal_blocks(other, self._row_sizes, self._column_sizes)
        if blocks is None:
            return None
        primal, dual = blocks
        return Saddle(self.B + primal, self.G, -dual if self.C is None else self.C - dual)

    def _scale(self, factor: Scalar) -> LinearOperator:
        C = None if self.C is None else factor * self.C
        return Saddle(factor * self.B, factor * self.G, C)
