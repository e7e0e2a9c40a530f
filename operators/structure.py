"""Which structure survives which operation: the one table of inference rules.

Every rule is a theorem about real square matrices; `tests/operators/test_structure.py` tries each
of them against dense matrices. A fact that no rule grants is dropped, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce


@dataclass(frozen=True)
class Structure:
    """Facts that are known of a square linear operator; False means "not known".

    Parameters
    ----------
    symmetric
        ``A = A^T``.
    positive_semidefinite
        ``<v, A v> >= 0`` for all v; implies symmetric here.
    positive_definite
        ``<v, A v> > 0`` for all v != 0; implies positive semidefinite.
    diagonal
        ``A_ij = 0`` for i != j; the same as symmetric and triangular.
    lower_triangular
        ``A_ij = 0`` for i < j.
    upper_triangular
        ``A_ij = 0`` for i > j.
    """

    symmetric: bool = False
    positive_semidefinite: bool = False
    positive_definite: bool = False
    diagonal: bool = False
    lower_triangular: bool = False
    upper_triangular: bool = False

    def __post_init__(self) -> None:
        # Facts imply one another; storing the closure keeps every rule below a plain formula.
        semidefinite = self.positive_semidefinite or self.positive_definite
        symmetric = self.symmetric or semidefinite or self.diagonal
        lower, upper = self.lower_triangular, self.upper_triangular
        diagonal = self.diagonal or (lower and upper) or (symmetric and (lower or upper))
        closure = {
            "positive_semidefinite": semidefinite,
            "symmetric": symmetric or diagonal,
            "diagonal": diagonal,
            "lower_triangular": lower or diagonal,
            "upper_triangular": upper or diagonal,
        }
        for fact, known in closure.items():
            object.__setattr__(self, fact, known)

    def __str__(self) -> str:
        """The facts that say all the others."""
        implied = {
            "symmetric": self.positive_semidefinite or self.diagonal,
            "positive_semidefinite": self.positive_definite,
            "lower_triangular": self.diagonal,
            "upper_triangular": self.diagonal,
        }
        known = (field.name for field in fields(self) if getattr(self, field.name))
        return ", ".join(fact.replace("_", " ") for fact in known if not implied.get(fact, False))

    def meet(self, other: Structure) -> Structure:
        """The facts that hold of both."""
        return Structure(
            **{f.name: getattr(self, f.name) and getattr(other, f.name) for f in fields(self)}
        )

    def join(self, other: Structure) -> Structure:
        """The facts of one and the same operator, known from two sources."""
        return Structure(
            **{f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)}
        )

    def plus(self, other: Structure) -> Structure:
        """Structure of A + B: a sum is definite if both are semidefinite and one is definite."""
        semidefinite = self.positive_semidefinite and other.positive_semidefinite
        return Structure(
            symmetric=self.symmetric and other.symmetric,
            positive_semidefinite=semidefinite,
            positive_definite=semidefinite and (self.positive_definite or other.positive_definite),
            lower_triangular=self.lower_triangular and other.lower_triangular,
            upper_triangular=self.upper_triangular and other.upper_triangular,
        )

    def times(self, factor: float | None) -> Structure:
        """Structure of c A; ``None`` for a factor whose sign is not known (a traced tensor)."""
        nonnegative = factor is not None and factor >= 0
        positive = factor is not None and factor > 0
        return Structure(
            symmetric=self.symmetric,
            positive_semidefinite=self.positive_semidefinite and nonnegative,
            positive_definite=self.positive_definite and positive,
            lower_triangular=self.lower_triangular,
            upper_triangular=self.upper_triangular,
        )

    def compose(self, other: Structure) -> Structure:
        """Structure of A B: only diagonal factors commute, so little survives."""
        diagonal = self.diagonal and other.diagonal
        return Structure(
            positive_semidefinite=diagonal
            and self.positive_semidefinite
            and other.positive_semidefinite,
            positive_definite=diagonal and self.positive_definite and other.positive_definite,
            lower_triangular=self.lower_triangular and other.lower_triangular,
            upper_triangular=self.upper_triangular and other.upper_triangular,
        )

    def transpose(self) -> Structure:
        """Structure of A^T: the triangles change places."""
        return Structure(
            symmetric=self.symmetric,
            positive_semidefinite=self.positive_semidefinite,
            positive_definite=self.positive_definite,
            lower_triangular=self.upper_triangular,
            upper_triangular=self.lower_triangular,
        )

    def inverse(self) -> Structure:
        """Structure of A^-1: what is semidefinite and has an inverse is definite."""
        return Structure(
            symmetric=self.symmetric,
            positive_definite=self.positive_semidefinite,
            lower_triangular=self.lower_triangular,
            upper_triangular=self.upper_triangular,
        )

    def congruence(self, frame: Structure | None = None) -> Structure:
        """Structure of J^T A J; `frame` is that of J where it is square."""
        frame = frame or Structure()
        return Structure(
            symmetric=self.symmetric,
            positive_semidefinite=self.positive_semidefinite,
            positive_definite=self.positive_definite and frame.positive_definite,
            lower_triangular=self.lower_triangular and frame.diagonal,
            upper_triangular=self.upper_triangular and frame.diagonal,
        )

    def kronecker(self, other: Structure) -> Structure:
        """Structure of A (x) B: the eigenvalues are products of theirs."""
        return self.meet(other)

    @staticmethod
    def block_diagonal(blocks: list[Structure]) -> Structure:
        """Structure of diag(A, B, ...) with square blocks: every fact that all of them share."""
        meet: Callable[[Structure, Structure], Structure] = Structure.meet
        return reduce(meet, blocks)
