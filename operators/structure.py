"""Which structure survives which operation: the one table of inference rules.

Every rule is a theorem about real matrices; `tests/operators/test_structure.py` tries each of them
against dense matrices. A fact that no rule grants is dropped, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Structure:
    """Facts that are known of a linear operator; False means "not known".

    Parameters
    ----------
    symmetric
        ``A = A^T``.
    positive_semidefinite
        ``<v, A v> >= 0`` for all v; implies symmetric here.
    positive_definite
        ``<v, A v> > 0`` for all v != 0; implies positive semidefinite.
    diagonal
        ``A_ij = 0`` for i != j; implies symmetric.
    """

    symmetric: bool = False
    positive_semidefinite: bool = False
    positive_definite: bool = False
    diagonal: bool = False

    def __post_init__(self) -> None:
        # Facts imply one another; storing the closure keeps every rule below a plain formula.
        semidefinite = self.positive_semidefinite or self.positive_definite
        object.__setattr__(self, "positive_semidefinite", semidefinite)
        object.__setattr__(self, "symmetric", self.symmetric or semidefinite or self.diagonal)

    def plus(self, other: Structure) -> Structure:
        """Structure of A + B: a sum is definite if both are semidefinite and one is definite."""
        semidefinite = self.positive_semidefinite and other.positive_semidefinite
        return Structure(
            symmetric=self.symmetric and other.symmetric,
            positive_semidefinite=semidefinite,
            positive_definite=semidefinite and (self.positive_definite or other.positive_definite),
            diagonal=self.diagonal and other.diagonal,
        )

    def times(self, factor: float | None) -> Structure:
        """Structure of c A; ``None`` for a factor whose sign is not known (a traced tensor)."""
        nonnegative = factor is not None and factor >= 0
        positive = factor is not None and factor > 0
        return Structure(
            symmetric=self.symmetric,
            positive_semidefinite=self.positive_semidefinite and nonnegative,
            positive_definite=self.positive_definite and positive,
            diagonal=self.diagonal,
        )

    def compose(self, other: Structure) -> Structure:
        """Structure of A B: only diagonal factors commute, so little survives."""
        diagonal = self.diagonal and other.diagonal
        return Structure(
            diagonal=diagonal,
            positive_semidefinite=diagonal
            and self.positive_semidefinite
            and other.positive_semidefinite,
            positive_definite=diagonal and self.positive_definite and other.positive_definite,
        )

    def transpose(self) -> Structure:
        """Structure of A^T: every fact here is invariant."""
        return self
