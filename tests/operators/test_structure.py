"""Every inference rule of `Structure`, both ways, over every pair of sets of facts.

Sound: what a rule grants holds for all matrices of the pool that have the facts it starts from.
Tight: what a rule drops fails for some of them, so that no rule could have granted it.
"""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from operators import Structure

# Enough matrices to refute each fact that does not follow; entries are small integers, so facts
# about them are decided exactly (eigenvalues to 1e-12).
POOL = [
    torch.tensor(rows, dtype=torch.float64)
    for rows in (
        [[1, 0], [0, 1]],
        [[-1, 0], [0, -1]],
        [[0, 0], [0, 0]],
        [[1, 0], [0, 3]],
        [[1, 0], [0, 0]],
        [[0, 0], [0, 2]],
        [[1, 0], [0, -2]],
        [[2, 1], [1, 2]],
        [[3, -1], [-1, 1]],
        [[1, 1], [1, 1]],
        [[1, -1], [-1, 1]],
        [[0, 1], [1, 0]],
        [[-2, 1], [1, -2]],
        [[0, 1], [0, 0]],
        [[0, 0], [1, 0]],
        [[1, 1], [0, 2]],
        [[-1, 2], [0, 1]],
        [[1, 0], [3, 2]],
        [[2, 0], [-1, -1]],
        [[1, 2], [-3, 4]],
        [[0, 1], [-1, 0]],
    )
]
FACTS = tuple(field.name for field in fields(Structure))
# The sets of facts that are closed under implication, as dataclass values.
STRUCTURES = sorted(
    {
        Structure(**dict(zip(FACTS, bits, strict=True)))
        for bits in itertools.product([False, True], repeat=len(FACTS))
    },
    key=repr,
)


def facts_of(matrix: Tensor) -> Structure:
    """Facts that are true of a matrix."""
    symmetric = torch.equal(matrix, matrix.T)
    smallest = float(torch.linalg.eigvalsh(matrix).min()) if symmetric else float("nan")
    return Structure(
        symmetric=symmetric,
        positive_semidefinite=smallest >= -1e-12,
        positive_definite=smallest > 1e-12,
        lower_triangular=torch.equal(matrix, matrix.tril()),
        upper_triangular=torch.equal(matrix, matrix.triu()),
    )


def claims(structure: Structure) -> set[str]:
    return {name for name in FACTS if getattr(structure, name)}


def having(structure: Structure) -> list[Tensor]:
    """Matrices of the pool that have at least these facts."""
    return [matrix for matrix in POOL if claims(structure) <= claims(facts_of(matrix))]


def common(matrices: list[Tensor]) -> set[str]:
    """Facts that all the matrices share."""
    return set.intersection(*(claims(facts_of(matrix)) for matrix in matrices))


def test_there_are_nine_closed_sets_of_facts_and_the_pool_tells_them_apart():
    assert len(STRUCTURES) == 9
    for structure in STRUCTURES:
        assert common(having(structure)) == claims(structure)


def test_implications():
    assert claims(Structure(positive_definite=True)) == {
        "positive_definite",
        "positive_semidefinite",
        "symmetric",
    }
    assert claims(Structure(positive_semidefinite=True)) == {"positive_semidefinite", "symmetric"}
    diagonal = {"diagonal", "symmetric", "lower_triangular", "upper_triangular"}
    assert claims(Structure(diagonal=True)) == diagonal
    assert claims(Structure(lower_triangular=True, upper_triangular=True)) == diagonal
    assert claims(Structure(lower_triangular=True, symmetric=True)) == diagonal
    assert claims(Structure(upper_triangular=True)) == {"upper_triangular"}
    assert claims(Structure()) == set()


def names_of(structure: Structure) -> str:
    return "+".join(sorted(claims(structure))) or "nothing"


@pytest.mark.parametrize("left", STRUCTURES, ids=names_of)
@pytest.mark.parametrize("right", STRUCTURES, ids=names_of)
class TestTwoOperators:
    def test_plus(self, left, right):
        sums = [a + b for a in having(left) for b in having(right)]
        assert claims(left.plus(right)) == common(sums)

    def test_plus_commutes(self, left, right):
        assert left.plus(right) == right.plus(left)

    def test_compose(self, left, right):
        products = [a @ b for a in having(left) for b in having(right)]
        assert claims(left.compose(right)) == common(products)

    def test_meet(self, left, right):
        assert claims(left.meet(right)) == claims(left) & claims(right)

    def test_kronecker(self, left, right):
        products = [torch.kron(a, b) for a in having(left) for b in having(right)]
        assert claims(left.kronecker(right)) == common(products)

    def test_block_diagonal(self, left, right):
        matrices = [torch.block_diag(a, b) for a in having(left) for b in having(right)]
        assert claims(Structure.block_diagonal([left, right])) == common(matrices)

    def test_congruence(self, left, right):
        products = [j.T @ a @ j for a in having(left) for j in having(right)]
        assert claims(left.congruence(right)) == common(products)


@pytest.mark.parametrize("structure", STRUCTURES, ids=names_of)
class TestOneOperator:
    @pytest.mark.parametrize("factor", [-1.0, -0.5, 1e-300, 2.0, 3])
    def test_times(self, structure, factor):
        scale = 1.0 if factor == 1e-300 else factor  # of the same sign, but not lost to rounding
        multiples = [scale * a for a in having(structure)]
        assert claims(structure.times(factor)) == common(multiples)

    def test_times_zero_is_sound(self, structure):
        # 0 A = 0 is diagonal and semidefinite whatever A is; the rule is content with less.
        assert claims(structure.times(0.0)) <= common([0.0 * a for a in having(structure)])
        assert not structure.times(0.0).positive_definite
        assert structure.times(0.0).positive_semidefinite == structure.positive_semidefinite

    def test_times_a_factor_of_unknown_sign(self, structure):
        multiples = [c * a for a in having(structure) for c in (-1.0, 0.0, 2.0)]
        assert claims(structure.times(None)) == common(multiples)

    def test_transpose(self, structure):
        assert claims(structure.transpose()) == common([a.T for a in having(structure)])

    def test_inverse(self, structure):
        invertible = [a for a in having(structure) if abs(torch.linalg.det(a)) > 0.5]
        inverses = [torch.linalg.inv(a).mul(60).round().div(60) for a in invertible]
        assert all(
            torch.allclose(a @ b, torch.eye(2).double())
            for a, b in zip(invertible, inverses, strict=True)
        )
        assert claims(structure.inverse()) == common(inverses)

    def test_congruence_of_any_shape(self, structure):
        frames = [torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)]
        frames += [torch.tensor([[1.0], [-1.0]], dtype=torch.float64), *POOL]
        products = [j.T @ a @ j for a in having(structure) for j in frames]
        assert claims(structure.congruence()) == common(products)

    def test_printed_facts_imply_all_of_them(self, structure):
        printed = [name.replace(" ", "_") for name in str(structure).split(", ") if name]
        assert Structure(**dict.fromkeys(printed, True)) == structure

    def test_nan_factor_grants_no_definiteness(self, structure):
        assert not structure.times(float("nan")).positive_semidefinite


def test_products_of_symmetric_matrices_are_not_symmetric_by_an_example_in_full():
    a, b = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert torch.equal(a @ b, torch.tensor([[2.0, 3.0], [1.0, 6.0]]))
    spd = Structure(positive_definite=True)
    assert spd.compose(Structure(positive_definite=True, diagonal=True)) == Structure()
