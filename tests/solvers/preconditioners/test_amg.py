"""Hierarchies of pyamg, and what conjugate gradients make of them."""

from __future__ import annotations

import numpy as np
import pyamg
import pytest
import scipy.sparse as sp
import torch

import operators as ops
import solvers
from solvers.preconditioners.amg import AMG
from tests.solvers.preconditioners.problems import convection, poisson, rough, sampled

pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")


def iterations(A: ops.LinearOperator, settings: object, rtol: float = 1e-8) -> int:
    b = sampled(A.shape[0], seed=1)
    info = solvers.CG(rtol=rtol, preconditioner=settings).prepare(A).solve(b).info
    assert info.converged
    return info.iterations


@pytest.mark.parametrize("sides", [(60, 60), (15, 15, 15)])
@pytest.mark.parametrize(
    ("kind", "build", "most"),
    [
        ("smoothed-aggregation", pyamg.smoothed_aggregation_solver, 9),
        ("ruge-stuben", pyamg.ruge_stuben_solver, 6),
        ("root-node", pyamg.rootnode_solver, 9),
    ],
)
def test_as_many_iterations_as_pyamg(sides, kind, build, most):
    A = poisson(*sides)
    residuals: list[float] = []
    theirs = build(A.to_scipy().copy(), max_coarse=100)
    theirs.solve(sampled(A.shape[0], seed=1).numpy(), accel="cg", tol=1e-8, residuals=residuals)
    ours = iterations(A, AMG(kind=kind))
    assert abs(ours - (len(residuals) - 1)) <= 1
    assert ours <= most


def test_iterations_stay_where_plain_ones_double():
    counts = [iterations(poisson(side, side), AMG()) for side in (16, 32, 64)]
    plain = [iterations(poisson(side, side), None) for side in (16, 32)]
    assert plain[1] > 1.8 * plain[0]
    assert counts[2] <= counts[0] + 2


@pytest.mark.parametrize("smoother", ["jacobi", "chebyshev"])
def test_smoothers_of_products_alone(smoother):
    assert iterations(poisson(60, 60), AMG(smoother=smoother)) <= 14


def test_more_sweeps_and_higher_degrees_smooth_better():
    A = poisson(40, 40)
    assert iterations(A, AMG(sweeps=3)) < iterations(A, AMG())
    low, high = (iterations(A, AMG(smoother="chebyshev", degree=degree)) for degree in (2, 4))
    assert high < low


def test_a_cycle_w_corrects_better_than_v():
    A = poisson(60, 60)
    assert iterations(A, AMG(cycle="W", max_coarse=3)) <= iterations(A, AMG(max_coarse=3))


def test_rigid_motions_are_what_elasticity_wants():
    A, modes = pyamg.gallery.linear_elasticity((20, 20))
    A = ops.Sparse(sp.csr_array(A), symmetric=True, positive_definite=True)
    with_modes = AMG(near_nullspace=torch.from_numpy(modes))
    assert iterations(A, with_modes) < 0.6 * iterations(A, AMG())
    for kind in ("smoothed-aggregation", "root-node"):
        P = AMG(kind=kind, near_nullspace=torch.from_numpy(modes), max_coarse=10).prepare(A)
        block = sampled(A.shape[0], 4)
        left, right = block[:, 0] @ P._matmat(block)[:, 1], P._matmat(block)[:, 0] @ block[:, 1]
        torch.testing.assert_close(left, right)


def test_strength_matters_where_couplings_differ():
    """Strong along one direction alone: weak couplings are to be left out of aggregates."""
    lines = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(30, 30))
    eye = sp.eye_array(30)
    A = sp.csr_array(sp.kron(lines, eye) + 1e-3 * sp.kron(eye, lines))
    A = ops.Sparse(A, symmetric=True, positive_definite=True)
    assert iterations(A, AMG(threshold=0.1)) < 0.7 * iterations(A, AMG())
    # The measure itself has an effect, and evolution leaves the matrix alone.
    before = A.values.clone()
    for measure in ("symmetric", "classical", "evolution"):
        P = AMG(strength=measure).prepare(A)
        assert P.unknowns[0] == 900
        assert len(P.unknowns) > 1
    assert torch.equal(A.values, before)


@pytest.mark.parametrize("kind", ["smoothed-aggregation", "ruge-stuben", "root-node"])
@pytest.mark.parametrize("cycle", ["V", "F"])
def test_the_transposed_cycle_of_a_nonsymmetric_matrix(kind, cycle):
    """The adjoint identity for the cycle, and the adjoint solve by its transpose."""
    A = convection(12, 12, wind=2.0)
    P = AMG(kind=kind, cycle=cycle, max_coarse=4).prepare(A)
    assert len(P.unknowns) >= 3
    u, v = sampled(144, seed=1), sampled(144, seed=2)
    torch.testing.assert_close(u @ P._matvec(v), P.T._matvec(u) @ v, rtol=1e-12, atol=1e-12)
    # Richardson iteration for A^T converges as that for A does: the spectra are the same.
    for M, Q in ((A, P), (A.T, P.T)):
        b, x = sampled(144, seed=3), torch.zeros(144, dtype=torch.float64)
        for _ in range(60):
            x = x + Q._matvec(b - M._matvec(x))
        assert torch.linalg.vector_norm(b - M._matvec(x)) < 1e-8 * torch.linalg.vector_norm(b)


def test_an_f_cycle_is_not_symmetric_and_says_so():
    A = rough(12, 2.0)
    P = AMG(cycle="F", max_coarse=2, smoother="jacobi").prepare(A)
    dense = P.to_dense()
    assert not P.symmetric
    assert torch.linalg.matrix_norm(dense - dense.T) > 1e-4 * torch.linalg.matrix_norm(dense)
    torch.testing.assert_close(P.T.to_dense(), dense.T)


def test_two_hierarchies_agree_bit_for_bit_and_numpy_goes_on_as_it_was():
    A, b = poisson(30, 30), sampled(900, 3)
    np.random.seed(5)  # noqa: NPY002
    settings = AMG(smoother="chebyshev", cycle="W", max_coarse=5)
    first = settings.prepare(A)
    drawn = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    assert drawn == np.random.random()  # noqa: NPY002
    second = settings.prepare(A)
    assert first.radii == second.radii
    for left, right in zip(first.matrices, second.matrices, strict=True):
        assert np.array_equal(left.data, right.data)
    assert torch.equal(first._matmat(b), second._matmat(b))


def test_a_singular_matrix_with_a_right_hand_side_in_its_range():
    """Pure Neumann: the coarsest system is singular, too."""
    line = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(20, 20)).tolil()
    line[0, 0] = line[-1, -1] = 1.0
    eye = sp.eye_array(20)
    A = ops.Sparse(sp.csr_array(sp.kron(line, eye) + sp.kron(eye, line)), symmetric=True)
    b = sampled(400)
    b = b - b.mean()
    for settings in (AMG(), AMG(max_coarse=500)):
        x, info = solvers.CG(rtol=1e-8, preconditioner=settings).prepare(A).solve(b)
        assert info.converged
        assert info.iterations <= 10
        assert torch.linalg.vector_norm(A @ x - b) <= 1e-8 * torch.linalg.vector_norm(b)


def test_a_coarsest_system_too_large_for_a_dense_inverse():
    A = poisson(100, 100)
    P = AMG(max_levels=2).prepare(A)
    assert P.unknowns[1] > 1000
    assert iterations(A, AMG(max_levels=2)) <= 8


@pytest.mark.parametrize("kind", ["smoothed-aggregation", "ruge-stuben", "root-node"])
def test_a_matrix_without_couplings(kind):
    """Nothing to coarsen by: all aggregates are lone, or all points coarse."""
    A = ops.Sparse(torch.diag(1 + sampled(300) ** 2), symmetric=True)
    assert iterations(A, AMG(kind=kind)) <= 2


def test_stale_hierarchies():
    """Weights exp(r g) that grow rougher: a hierarchy for the smooth ones gets worse and worse.

    At 300 x 300 it took 11 iterations where a fresh one took 10, then 33 and 10, then 119 and 19.
    """
    b = sampled(2500, seed=1)
    solver = solvers.CG(rtol=1e-8, preconditioner=AMG())
    prepared = solver.prepare(rough(50, 0.0))
    first = prepared.solve(b).info.iterations
    stale, fresh = {}, {}
    for roughness in (0.1, 0.5, 1.0):
        A = rough(50, roughness)
        fresh[roughness] = solver.prepare(A).solve(b).info.iterations
        updated = prepared.update(A)
        info = updated.solve(b).info
        stale[roughness] = info.iterations
        assert not info.refreshed
        # More than twice the iterations: made anew for the next solve, else kept.
        again = updated.solve(b).info
        assert again.refreshed == (roughness > 0.1)
        assert again.iterations == (fresh if again.refreshed else stale)[roughness]
    assert stale[0.1] <= fresh[0.1] + 2
    assert stale[0.5] > 1.5 * fresh[0.5]
    assert stale[1.0] > 2.5 * fresh[1.0]
    assert prepared.solve(b).info.iterations == first


def test_a_stale_hierarchy_that_fails_is_made_anew_at_once():
    b = sampled(2500, seed=1)
    solver = solvers.CG(rtol=1e-8, preconditioner=AMG(), maxiter=40)
    prepared = solver.prepare(rough(50, 0.0))
    prepared.solve(b)
    info = prepared.update(rough(50, 1.5)).solve(b).info
    assert info.converged
    assert info.refreshed


def test_what_is_reported():
    A = poisson(30, 30)
    P = AMG(max_coarse=10).prepare(A)
    assert P.unknowns == [level.shape[0] for level in P.matrices]
    assert P.unknowns[0] == 900
    assert P.unknowns[-1] <= 10
    assert P.operator_complexity == sum(P.nonzeros) / A.nnz
    table = P.hierarchy.splitlines()
    assert table[0] == (
        f"smoothed-aggregation, {len(P.unknowns)} levels, operator complexity "
        f"{P.operator_complexity:.2f}"
    )
    assert [int(row.split()[1]) for row in table[2:]] == P.unknowns
    assert "V-cycle over" in str(P)
    info = solvers.CG(preconditioner=AMG()).prepare(A).solve(sampled(900)).info
    assert info.backend == "pyamg"
    assert 1 < info.operator_complexity < 2


def test_float32():
    A = poisson(40, 40, dtype=torch.float32)
    b = sampled(1600).float()
    x, info = solvers.CG(rtol=1e-5, preconditioner=AMG()).prepare(A).solve(b)
    assert x.dtype == torch.float32
    assert info.iterations <= 7


def test_dense_matrices_and_sums_of_sparse_ones():
    A = poisson(12, 12)
    P = AMG(max_coarse=10).prepare(A)
    v = sampled(144)
    dense = AMG(max_coarse=10).prepare(ops.Dense(A.to_dense(), symmetric=True))
    assert torch.equal(P @ v, dense @ v)
    total = ops.Sum(A, ops.Diagonal(torch.ones(144, dtype=torch.float64)))
    shifted = AMG(max_coarse=10).prepare(total)
    assert torch.equal(shifted @ v, AMG(max_coarse=10).prepare(A + ops.Identity(144)) @ v)


def test_settings_with_candidates_compare():
    modes = torch.ones(4, 1)
    assert AMG(near_nullspace=modes) == AMG(near_nullspace=modes)
    assert AMG(near_nullspace=modes) != AMG(near_nullspace=modes.clone())
    assert AMG(near_nullspace=modes) != AMG()
    assert AMG() != "AMG"
    assert "tensor" not in repr(AMG(near_nullspace=modes))


def test_what_it_refuses():
    for name, value, expected in (
        ("kind", "geometric", "'smoothed-aggregation', 'ruge-stuben', 'root-node'"),
        ("cycle", "K", "'V', 'W', 'F'"),
        ("smoother", "ilu", "'gauss-seidel', 'jacobi', 'chebyshev'"),
        ("strength", "energy", "'symmetric', 'classical', 'evolution', None"),
    ):
        with pytest.raises(ValueError, match=f"AMG: {name}='{value}'; expected one of {expected}"):
            AMG(**{name: value})
    for name in ("sweeps", "degree", "max_coarse", "max_levels"):
        with pytest.raises(ValueError, match=f"AMG: {name}=0; expected at least 1"):
            AMG(**{name: 0})
    with pytest.raises(ValueError, match="near_nullspace with kind='ruge-stuben'"):
        AMG(kind="ruge-stuben", near_nullspace=torch.ones(3))
    with pytest.raises(ValueError, match=r"threshold=-1; expected a number >= 0"):
        AMG(threshold=-1)
    A = poisson(3, 3)
    with pytest.raises(ValueError, match=r"near_nullspace has shape \(4, 2\); expected \(9,\)"):
        AMG(near_nullspace=torch.ones(4, 2)).prepare(A)
    with pytest.raises(solvers.StructureError, match=r"AMG needs the nonzeros"):
        AMG().prepare(ops.Hessian(lambda y: (y**4).sum(), torch.ones(3)))
    saddle = ops.Sparse(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), symmetric=True)
    with pytest.raises(solvers.SingularError, match=r"AMG: the diagonal .* zero in row 1"):
        AMG().prepare(saddle)
