"""`FunctionOperator`: a user's own product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import operators as ops
import solvers
from operators import Cost, FunctionOperator, Space

F64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=F64)


MATRIX = sampled(3, 4)
INNER = {"a": torch.zeros(2, 2, dtype=F64), "b": torch.zeros((), dtype=F64)}


def nested(v: dict[str, Tensor], scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """From {a: (2, 2), b: ()} to (trace a, {c: scale * (b, a_01)})."""
    return v["a"].trace()[None], {"c": scale * torch.stack([v["b"], v["a"][0, 1]])}


class TestProduct:
    def test_flat(self):
        A = FunctionOperator(lambda v: MATRIX @ v, zeros(4))
        assert A.shape == (3, 4)
        assert A.structure == ops.Structure()
        close(A.to_dense(), MATRIX)
        close(A.T.to_dense(), MATRIX.T)
        close(A @ sampled(4, 2), MATRIX @ sampled(4, 2))
        close(A.T @ sampled(3, 2), MATRIX.T @ sampled(3, 2))

    def test_nested(self):
        A = FunctionOperator(nested, INNER, torch.tensor(2.0, dtype=F64))
        assert A.shape == (3, 5)
        v = {"a": sampled(2, 2), "b": sampled()}
        first, rest = A @ v
        close(first, v["a"].trace()[None])
        close(rest["c"], 2 * torch.stack([v["b"], v["a"][0, 1]]))
        u = (sampled(1), {"c": sampled(2, seed=1)})
        back = A.T @ u
        close(
            back["a"],
            torch.stack(
                [torch.stack([u[0][0], 2 * u[1]["c"][1]]), torch.stack([zeros(1)[0], u[0][0]])]
            ),
        )
        close(back["b"], 2 * u[1]["c"][0])
        close(A.T.to_dense(), A.to_dense().T)

    def test_domain_as_a_space(self):
        for domain in (Space.of(INNER), INNER):
            A = FunctionOperator(nested, domain, torch.tensor(2.0, dtype=F64))
            assert A.domain == Space.of(INNER)

    def test_values_and_gradients_of_the_example_do_not_matter(self):
        example = torch.full((4,), float("nan"), dtype=F64).requires_grad_()
        A = FunctionOperator(lambda v: MATRIX @ v, example)
        close(A @ sampled(4), MATRIX @ sampled(4))
        assert not A.to_dense().requires_grad

    @pytest.mark.parametrize("sizes", [(0, 0), (3, 0), (0, 3)])
    def test_empty(self, sizes):
        m, n = sizes
        A = FunctionOperator(lambda v: torch.zeros(m, n, dtype=F64) @ v, zeros(n))
        assert A.shape == sizes
        assert torch.equal(A @ zeros(n), zeros(m))
        assert torch.equal(A.T @ zeros(m), zeros(n))
        assert A.to_dense().shape == sizes
        assert (A @ torch.zeros(n, 0, dtype=F64)).shape == (m, 0)

    def test_inputs_that_are_not_contiguous(self):
        A = FunctionOperator(lambda v: v.reshape(2, 2).T.reshape(-1), zeros(4))
        v, block = sampled(8)[::2], sampled(3, 4).T
        assert not v.is_contiguous()
        assert not block.is_contiguous()
        close(A @ v, v.reshape(2, 2).T.reshape(-1))
        close(A @ block, A.to_dense() @ block)
        close(A.T @ block, A.to_dense().T @ block)

    def test_a_function_that_does_not_depend_on_v(self):
        A = FunctionOperator(lambda v: torch.zeros(2, dtype=F64), zeros(3))
        assert torch.equal(A @ sampled(3), zeros(2))
        assert torch.equal(A @ sampled(3, 2), torch.zeros(2, 2, dtype=F64))
        assert torch.equal(A.T @ sampled(2), zeros(3))
        assert torch.equal(A.T @ sampled(2, 2), torch.zeros(3, 2, dtype=F64))

    def test_float32(self):
        matrix = MATRIX.float()
        A = FunctionOperator(lambda v, M: M @ v, torch.zeros(4), matrix)
        assert (A @ torch.ones(4)).dtype == torch.float32
        assert A.T.to_dense().dtype == torch.float32


class TestTranspose:
    def test_by_a_function(self):
        calls = []

        def rmatvec(u, M):
            calls.append(1)
            return M.T @ u

        A = FunctionOperator(lambda v, M: M @ v, zeros(4), MATRIX, rmatvec=rmatvec)
        close(A.T @ sampled(3), MATRIX.T @ sampled(3))
        assert calls
        gradient = grad(lambda A: (A.T @ sampled(3)) @ sampled(4))(A)
        close(gradient.args[0], torch.outer(sampled(3), sampled(4)))

    def test_of_a_symmetric_one_is_itself(self):
        A = FunctionOperator(lambda v: v.flip(0), zeros(4), symmetric=True)
        assert A.T is A


class TestDerivatives:
    v, u = sampled(3), sampled(3, seed=1)

    @staticmethod
    def matvec(v: Tensor, a: Tensor, b: dict[str, Tensor]) -> Tensor:
        return torch.sin(a) * v.roll(1) + b["c"] ** 2 * v

    def of(self, a: Tensor, b: Tensor) -> FunctionOperator:
        return FunctionOperator(self.matvec, zeros(3), a, {"c": b})

    def energy(self, a: Tensor, b: Tensor) -> Tensor:
        return self.u @ (self.of(a, b) @ self.v)

    def expected(self, a: Tensor, b: Tensor) -> Tensor:
        return self.u @ self.matvec(self.v, a, {"c": b})

    def test_first_and_second_with_respect_to_args(self):
        a, b = sampled(3, seed=2), sampled(3, seed=3)
        for derivative in (grad, jacrev, jacfwd, hessian):
            ours = derivative(self.energy, argnums=(0, 1))(a, b)
            theirs = derivative(self.expected, argnums=(0, 1))(a, b)
            torch.testing.assert_close(ours, theirs)

    def test_with_respect_to_args_and_v_at_once(self):
        a, b = sampled(3, seed=2), sampled(3, seed=3)
        moved = (sampled(3, seed=4), sampled(3, seed=5))
        for transpose in (False, True):

            def product(a, v, transpose=transpose):
                A = self.of(a, b)
                return (A.T if transpose else A) @ v

            h = 1e-6
            tangent = jvp(product, (a, self.v), moved)[1]
            ahead = product(a + h * moved[0], self.v + h * moved[1])
            behind = product(a - h * moved[0], self.v - h * moved[1])
            torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-8)

    def test_plain_autograd_sees_closed_over_tensors_too(self):
        c = sampled(3).requires_grad_()
        A = FunctionOperator(lambda v: c * v, zeros(3))
        for B in (A, A.T):
            (slope,) = torch.autograd.grad(self.u @ (B @ self.v), c)
            close(slope, self.u * self.v)

    def test_backward_twice_through_leaves(self):
        a = sampled(3, seed=2).requires_grad_()
        A = self.of(a, sampled(3, seed=3))
        for _ in range(2):
            a.grad = None
            (self.u @ (A @ self.v)).backward()
            close(a.grad, self.u * torch.cos(a.detach()) * self.v.roll(1))

    def test_args_changed_in_place(self):
        a = sampled(3, seed=2)
        A = self.of(a, zeros(3))
        A @ self.v, A.T @ self.v
        a.add_(1.0)
        close(A @ self.v, torch.sin(a) * self.v.roll(1))

    def test_mapped_args(self):
        a, b = sampled(4, 3), sampled(3, seed=1)
        close(
            vmap(lambda a: self.of(a, b) @ self.v)(a),
            torch.sin(a) * self.v.roll(1) + b**2 * self.v,
        )
        close(
            vmap(lambda a: self.of(a, b).T @ self.v)(a),
            (torch.sin(a) * self.v).roll(-1, 1) + b**2 * self.v,
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("matvec", "error", "message"),
        [
            (lambda v: v.long(), TypeError, r"matvec\(v\).*int64; expected a floating"),
            (lambda v: None, TypeError, r"matvec\(v\) has a leaf of type NoneType"),
            (lambda v: [], ValueError, r"matvec\(v\) holds no tensor"),
            (lambda v: float(v.sum()), TypeError, r"matvec\(v\) has a leaf of type float"),
            (lambda v: v.float(), TypeError, r"domain is torch.float64.*codomain is torch.float32"),
            (lambda v: [v, v.float()], TypeError, r"matvec\(v\) mixes dtypes"),
        ],
    )
    def test_what_is_no_tensor(self, matvec, error, message):
        with pytest.raises(error, match=message):
            FunctionOperator(matvec, zeros(3))

    @pytest.mark.parametrize(
        "domain", [torch.zeros(3, dtype=torch.int64), 3, [], torch.nn.Linear(1, 1)]
    )
    def test_domains(self, domain):
        with pytest.raises((TypeError, ValueError), match="domain"):
            FunctionOperator(lambda v: v, domain)

    @pytest.mark.parametrize(
        "claim", ["symmetric", "positive_definite", "positive_semidefinite", "lower_triangular"]
    )
    def test_claims_about_rectangles(self, claim):
        with pytest.raises(ValueError, match=r"matvec maps|structure claims"):
            FunctionOperator(lambda v: v[1:], zeros(3), **{claim: True})

    def test_symmetric_between_two_structures(self):
        with pytest.raises(ValueError, match=r"matvec maps .*'a'.* to .*'b'.*not symmetric"):
            FunctionOperator(lambda v: {"b": v["a"]}, {"a": zeros(3)}, symmetric=True)

    def test_a_shape_that_changes(self):
        A = FunctionOperator(lambda v: v if bool(v.sum() == 0) else v[1:], zeros(3))
        with pytest.raises(ValueError, match=r"matvec\(v\) has structure \(2,\)"):
            A @ sampled(3)

    def test_product_of_a_transpose_that_does_not_fit(self):
        A = FunctionOperator(lambda v: v[1:], zeros(3), rmatvec=lambda u: {"u": u})
        with pytest.raises(ValueError, match=r"rmatvec\(u\) has structure"):
            A.T @ zeros(2)


def test_cost():
    assert FunctionOperator(lambda v: v, zeros(2)).cost == Cost(evaluations=1)
    assert FunctionOperator(lambda v: v, zeros(2), cost=Cost(flops=5)).cost == Cost(flops=5)


def test_solves():
    A = FunctionOperator(
        lambda v, d: d * v + v.mean(), zeros(3), sampled(3).exp(), positive_definite=True
    )
    b = sampled(3, seed=1)
    for solver in (solvers.CG(rtol=1e-12), solvers.DenseLU(), solvers.DenseCholesky()):
        torch.testing.assert_close(A @ solver.prepare(A).solve(b).value, b)
