"""`LinearSystemSequence`: what it keeps, what it tells the bandit, and that it solves."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from torch import Tensor

import operators as ops
from operators import LinearOperator
from solvers import CG, ConvergenceWarning, DenseLU, Info, Neumann, NotConvergedError
from solvers.preconditioner import Preconditioner
from solvers.sequences.bandit import Bandit, TsallisINF
from solvers.sequences.contextual import BinnedBandit
from solvers.sequences.sequence import LinearSystemSequence
from solvers.stationary.sor import SOR

FLOAT64 = torch.float64
N = 30
pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


BASIS, _ = torch.linalg.qr(sampled(N, N, seed=1))
SKEW, EYE = sampled(N, N, seed=2), torch.eye(N, dtype=FLOAT64)


def spd(time: float = 0.0, condition: float = 100.0) -> LinearOperator:
    """Eigenvalues from 1 to the condition number, which move with time, and so does the basis."""
    eigenvalues = torch.logspace(0, math.log10(condition), N, dtype=FLOAT64) * (1 + 0.1 * time)
    # Cayley's transform of a skew matrix is orthogonal.
    skew = 0.01 * time * (SKEW - SKEW.T)
    basis = BASIS @ torch.linalg.solve(EYE + skew, EYE - skew)
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return ops.Dense((matrix + matrix.T) / 2, positive_definite=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen(Preconditioner):
    """``(1 - loss) A^-1 + loss I / |A|``: exact when new and without loss, and then it ages."""

    loss: float = 0.0

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        matrix = A.to_dense()
        inverse = torch.linalg.inv(matrix)
        P = (1 - self.loss) * (inverse + inverse.T) / 2
        P = P + self.loss * torch.eye(N, dtype=FLOAT64) / torch.linalg.matrix_norm(matrix, 2)
        return ops.Dense(P, positive_definite=True)


class Scripted(Bandit):
    """Plays the arms in turn and writes down what it is told."""

    _learned = ()

    def __init__(self, arms: int, **options: float) -> None:
        super().__init__(arms, **options)
        self.told: list[tuple[int, float]] = []
        self.contexts: list[float | None] = []

    def probabilities(self, context: float | None = None) -> Tensor:
        self.contexts.append(context)
        return torch.nn.functional.one_hot(
            torch.tensor(len(self.told) % self.arms), self.arms
        ).double()

    def _learn(self, arm: int, probability: float, context: float, cost: float) -> None:
        self.told.append((arm, cost))


def right(A: LinearOperator, x: Tensor, b: Tensor, rtol: float = 1e-7) -> bool:
    return float((A @ x - b).norm()) <= rtol * float(b.norm())


class TestWarmStarts:
    def drift(self, warm_start, rounds: int = 12) -> list[int]:
        systems = LinearSystemSequence(CG(rtol=1e-8), warm_start=warm_start)
        for t in range(rounds):
            A, b = spd(1e-2 * t), sampled(N) + 1e-2 * t * sampled(N, seed=3)
            x, info = systems.solve(A, b)
            assert right(A, x, b, 1e-8)
            assert info.converged
        return [step.info.iterations for step in systems.history]

    def test_the_better_the_guess_the_fewer_iterations(self):
        cold, previous, linear = (self.drift(kind) for kind in (None, "previous", "linear"))
        assert cold[0] == previous[0] == linear[0]
        assert sum(linear[2:]) < sum(previous[2:]) < sum(cold[2:])

    @pytest.mark.parametrize("kind", ["previous", "linear"])
    @pytest.mark.parametrize("factor", [1e-30, -3.0, 1e30])
    def test_a_right_hand_side_that_was_merely_scaled_takes_no_iteration(self, kind, factor):
        systems, A = LinearSystemSequence(CG(rtol=1e-8), warm_start=kind), spd()
        for scale in (1.0, 1.0, factor):
            b = scale * sampled(N, 3)
            x, info = systems.solve(A, b)
            assert info.converged
            torch.testing.assert_close(A @ x, b, rtol=0, atol=1e-7 * float(b.abs().max()))
        assert info.iterations == 0
        assert systems.history[-1].start <= 1e-8

    def test_linear_extrapolation_meets_solutions_on_a_line(self):
        systems, A = LinearSystemSequence(CG(rtol=1e-6), warm_start="linear"), spd()
        first, second = sampled(N, seed=4), sampled(N, seed=5)
        for t in range(4):
            systems.solve(A, A @ (first + t * second))
        assert [step.info.iterations > 0 for step in systems.history] == [True, True, False, False]

    def test_a_guess_of_no_use_is_not_used(self):
        """Right-hand sides at right angles, in terms of A: the count is that from zero."""
        A, b, c = spd(), sampled(N), sampled(N, seed=1)
        image = A @ torch.linalg.solve(A.to_dense(), b)
        c = c - image * (image @ c) / (image @ image)
        systems = LinearSystemSequence(CG(rtol=1e-8))
        systems.solve(A, b)
        info = systems.solve(A, c).info
        assert systems.history[1].start == 1.0
        assert info == CG(rtol=1e-8).prepare(A).solve(c).info

    def test_the_tolerance_is_relative_to_b(self):
        systems, A, b = LinearSystemSequence(CG(rtol=1e-6)), spd(), sampled(N)
        systems.solve(A, b)
        changed = b + 1e-3 * sampled(N, seed=6)
        x, info = systems.solve(A, changed)
        assert info.residual == pytest.approx(float((A @ x - changed).norm() / changed.norm()))
        assert 0 < info.iterations < systems.history[0].info.iterations

    def test_columns_zero_columns_and_other_numbers_of_them(self):
        systems, A = LinearSystemSequence(CG(rtol=1e-8)), spd()
        block = sampled(N, 3)
        block[:, 1] = 0
        for b in (
            block,
            2 * block,
            block[:, :2],
            block[:, 0],
            torch.zeros(N, dtype=FLOAT64),
            block,
        ):
            x, _ = systems.solve(A, b)
            assert x.shape == b.shape
            torch.testing.assert_close(A @ x, b, rtol=0, atol=1e-6)
        assert [step.start < 1 for step in systems.history] == [
            False,
            True,
            False,
            False,
            True,
            False,
        ]

    def test_nested_right_hand_sides(self):
        matrix = spd().to_dense()

        def loss(y: dict[str, Tensor]) -> Tensor:
            flat = torch.cat([y["w"], y["b"].reshape(-1)])
            return flat @ matrix @ flat / 2

        def nested(flat: Tensor) -> dict[str, Tensor]:
            return {"w": flat[:10], "b": flat[10:].reshape(4, 5)}

        A = ops.Hessian(loss, nested(sampled(N)))
        systems = LinearSystemSequence(CG(rtol=1e-8))
        for b in (nested(sampled(N)), nested(3 * sampled(N))):
            x, info = systems.solve(A, b)
            assert A.domain.holds(x)
        assert info.iterations == 0

    def test_shape_and_dtype_may_change(self):
        systems = LinearSystemSequence(CG(rtol=1e-4))
        for n, dtype in ((5, FLOAT64), (6, FLOAT64), (6, torch.float32), (6, torch.float32)):
            A = ops.Diagonal(torch.linspace(1, 2, n, dtype=dtype))
            x, _ = systems.solve(A, torch.ones(n, dtype=dtype))
            assert x.dtype == dtype
            torch.testing.assert_close(A @ x, torch.ones(n, dtype=dtype), rtol=1e-3, atol=1e-3)
        assert [step.start < 1 for step in systems.history] == [False, False, False, True]

    def test_a_batch(self):
        systems = LinearSystemSequence(CG(rtol=1e-8))
        matrices = torch.stack([spd().to_dense(), spd(1.0).to_dense()])
        batched = torch.func.vmap(lambda M: ops.Dense(M, positive_definite=True))(matrices)
        A = ops.Stacked.of(batched)
        for factor in (1.0, 4.0):
            x, info = systems.solve(A, factor * sampled(2 * N))
            torch.testing.assert_close(A @ x, factor * sampled(2 * N), rtol=0, atol=1e-6)
        assert info.iterations == 0

    def test_direct_solvers_are_given_no_guess(self):
        systems, A, b = LinearSystemSequence(DenseLU()), spd(), sampled(N)
        for _ in range(2):
            assert systems.solve(A, b).info.products == 1
        assert [step.start for step in systems.history] == [1.0, 1.0]


class TestTransposedSystems:
    A = ops.Dense(torch.eye(N, dtype=FLOAT64) + 0.02 * sampled(N, N, seed=7))

    def test_have_their_own_warm_starts(self):
        systems, b, c = LinearSystemSequence(Neumann(rtol=1e-8)), sampled(N), sampled(N, seed=8)
        for _ in range(2):
            x, y = systems.solve(self.A, b).value, systems.solve_transpose(self.A, c).value
            assert right(self.A, x, b)
            assert right(self.A.T, y, c)
        steps = systems.history
        assert [step.transpose for step in steps] == [False, True, False, True]
        assert [step.info.iterations > 0 for step in steps] == [True, True, False, False]

    def test_use_the_factorisation_of_the_forward_solve(self):
        systems = LinearSystemSequence(DenseLU())
        x = systems.solve(self.A, sampled(N)).value
        y = systems.solve_transpose(self.A, sampled(N, seed=8)).value
        assert [step.fresh for step in systems.history] == [True, False]
        torch.testing.assert_close(sampled(N, seed=8) @ x, y @ sampled(N))


class TestKeptPreconditioners:
    def run(self, systems: LinearSystemSequence, times: list[float]) -> list[bool]:
        for t in times:
            A = spd(t)
            x, _ = systems.solve(A, sampled(N))
            assert right(A, x, sampled(N))
        return [step.fresh for step in systems.history]

    def test_while_they_serve(self):
        systems = LinearSystemSequence(CG(preconditioner=Frozen()), warm_start=None)
        assert self.run(systems, [0.0, 0.001, 0.002]) == [True, False, False]
        assert self.run(systems, [20.0]) == [True, False, False, False]
        assert systems.history[-1].info.iterations > 10
        # Worn out: that of the next system is quick again.
        self.run(systems, [20.0, 20.001])
        assert all(step.info.iterations <= 6 for step in systems.history[-2:])

    @pytest.mark.parametrize("refresh", [1.5, 1000.0])
    def test_a_good_guess_does_not_hide_that_one_has_aged(self, refresh):
        """By the iterations alone, which a guess keeps few, it would never look worn."""
        systems = LinearSystemSequence(
            CG(rtol=1e-10, preconditioner=Frozen(loss=0.5)), refresh=refresh
        )
        flags = self.run(systems, [0.3 * t for t in range(20)])
        starts = [step.start for step in systems.history[1:]]
        assert max(starts) < 0.5
        assert flags[0]
        assert any(flags[1:]) == (refresh < 10)

    def test_or_not(self):
        systems = LinearSystemSequence(CG(preconditioner=Frozen()), recycle=False)
        assert self.run(systems, [0.0, 0.001, 0.002]) == [True, True, True]

    def test_each_value_keeps_its_own(self):
        systems = LinearSystemSequence(
            CG(preconditioner=Frozen()),
            knob="preconditioner.loss",
            values=[0.0, 0.9],
            bandit=Scripted(2),
            recycle=True,
            warm_start=None,
        )
        assert self.run(systems, 6 * [0.0]) == [True, True] + 4 * [False]
        few, many = (
            [step.info.iterations for step in systems.history if step.value == value]
            for value in (0.0, 0.9)
        )
        assert few[0] < many[0]


class TestKnobs:
    def test_a_setting_of_the_preconditioner(self):
        systems = LinearSystemSequence(
            CG(preconditioner=Frozen()),
            knob="preconditioner.loss",
            values=[0.0, 0.5],
            bandit=Scripted(2),
            warm_start=None,
        )
        A, b = spd(), sampled(N)
        for _ in range(4):
            systems.solve(A, b)
        expected = {
            loss: CG(preconditioner=Frozen(loss=loss)).prepare(A).solve(b).info.iterations
            for loss in (0.0, 0.5)
        }
        steps = systems.history
        assert [step.value for step in steps] == [0.0, 0.5, 0.0, 0.5]
        assert [step.info.iterations for step in steps] == [expected[step.value] for step in steps]
        # The bandit hears of the iterations and of nothing else.
        assert systems.bandit.told == [(i % 2, float(steps[i].info.iterations)) for i in range(4)]
        assert [step.cost for step in steps] == [cost for _, cost in systems.bandit.told]
        assert all(step.fresh for step in steps)

    def test_a_function_that_makes_the_solver(self):
        systems = LinearSystemSequence(
            lambda alpha: Neumann(step_size=alpha, rtol=1e-4, maxiter=500),
            values=[0.1, 1.0],
            warm_start=None,
        )
        A = ops.Diagonal(torch.tensor([0.9, 1.0, 1.1], dtype=FLOAT64))
        for _ in range(150):
            systems.solve(A, torch.ones(3, dtype=FLOAT64))
        late = [step.value for step in systems.history[-50:]]
        assert late.count(1.0) > 40

    def test_a_value_that_breaks_off_at_once_is_not_taken_for_a_quick_one(self):
        """Step 50 diverges within three iterations; it is charged the limit, 400."""
        systems = LinearSystemSequence(
            Neumann(rtol=1e-6, maxiter=400),
            knob="step_size",
            values=[50.0, 0.5],
            bandit=Scripted(2),
        )
        A, b = ops.Diagonal(torch.tensor([0.5, 1.0], dtype=FLOAT64)), torch.ones(2, dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning, match="diverged after"):
            systems.solve(A, b)
        assert systems.solve(A, b).info.converged
        (_, broken), (_, sound) = systems.bandit.told
        assert systems.history[0].info.iterations < 10
        assert broken == 400.0
        assert 10 < sound == systems.history[1].info.iterations

    def test_a_strict_solver_raises_and_the_bandit_learns(self):
        systems = LinearSystemSequence(
            Neumann(maxiter=400, strict=True),
            knob="step_size",
            values=[50.0, 0.5],
            bandit=Scripted(2),
        )
        A, b = ops.Diagonal(torch.tensor([0.5, 1.0], dtype=FLOAT64)), torch.ones(2, dtype=FLOAT64)
        with pytest.raises(NotConvergedError, match="diverged"):
            systems.solve(A, b)
        assert systems.bandit.told == [(0, 400.0)]
        assert right(A, systems.solve(A, b).value, b)
        assert not systems.history[0].info.converged

    @pytest.mark.parametrize("cost", ["products", "seconds", lambda info: 3.0 + info.residual])
    def test_other_costs(self, cost):
        systems = LinearSystemSequence(
            CG(), knob="rtol", values=[1e-4, 1e-8], bandit=Scripted(2, least=0.0), cost=cost
        )
        A, b = spd(), sampled(N, 2)
        for _ in range(2):
            systems.solve(A, b)
        for step in systems.history:
            info: Info = step.info
            assert info.residual <= step.value
            if cost == "products":
                assert step.cost == info.products
            elif cost == "seconds":
                assert step.cost == info.solve_seconds + info.setup_seconds
            else:
                assert step.cost == 3.0 + info.residual

    def test_preparing_is_paid_for_once(self):
        systems = LinearSystemSequence(
            CG(), knob="rtol", values=[1e-4], bandit=Scripted(1, least=0.0), cost="seconds"
        )
        A = spd()
        for _ in range(2):
            systems.solve(A, sampled(N))
        assert systems.history[1].cost == systems.history[1].info.solve_seconds

    def test_contexts_reach_the_bandit(self):
        systems = LinearSystemSequence(CG(), knob="rtol", values=[1e-4], bandit=Scripted(1))
        for context in (0.25, None):
            systems.solve(spd(), sampled(N), context=context)
        assert systems.bandit.contexts == [0.25, None]
        needy = LinearSystemSequence(
            CG(), knob="rtol", values=[1e-4], bandit=BinnedBandit(1, 0.0, 1.0)
        )
        with pytest.raises(ValueError, match="context=None; expected a finite number"):
            needy.solve(spd(), sampled(N))

    def test_no_iteration_at_all_is_the_least_cost(self):
        systems = LinearSystemSequence(CG(), knob="rtol", values=[1e-6], bandit=TsallisINF(1))
        for _ in range(2):
            systems.solve(spd(), sampled(N))
        assert systems.history[1].info.iterations == 0
        assert systems.history[1].cost == 1.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"knob": "rtol"}, "knob='rtol' with values=None; expected both or neither"),
            ({"values": [1.0]}, r"knob=None with values=\[1.0\]; expected both or neither"),
            ({"knob": "rtol", "values": []}, "values is empty"),
            ({"knob": "omega", "values": [1.0]}, r"CG\(.*\) has no setting 'omega'; it has rtol"),
            ({"knob": "preconditioner.omega", "values": [1.0]}, "None has no setting 'omega'; it"),
            ({"knob": "rtol", "values": [-1.0]}, "CG: rtol=-1.0; expected a number >= 0"),
            ({"bandit": TsallisINF(2)}, "a bandit without values to choose from"),
            (
                {"knob": "rtol", "values": [0.1], "bandit": TsallisINF(2)},
                "the bandit has 2 arms for 1 values",
            ),
            (
                {"knob": "rtol", "values": [0.1], "bandit": TsallisINF(1), "cost": "seconds"},
                "the bandit has least=1, but seconds may be fewer; make it with least=0.0",
            ),
            ({"cost": "flops"}, r"cost='flops'; expected one of \('iterations', 'products', 'sec"),
            ({"warm_start": "last"}, r"warm_start='last'; expected one of \('previous', 'linear'"),
            ({"refresh": 0.5}, "refresh=0.5; expected at least 1"),
        ],
    )
    def test_settings_that_do_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            LinearSystemSequence(CG(), **options)

    def test_what_is_no_solver(self):
        with pytest.raises(TypeError, match=r"expected settings of a solver, as solvers\.CG"):
            LinearSystemSequence(CG)
        with pytest.raises(TypeError, match=r"solver\(value\) returned 0.5; expected settings"):
            LinearSystemSequence(lambda value: value, values=[0.5])
        with pytest.raises(ValueError, match="needs values, and no knob"):
            LinearSystemSequence(lambda value: CG(rtol=value))


class TestState:
    def make(self, seed: int) -> LinearSystemSequence:
        return LinearSystemSequence(
            Neumann(rtol=1e-6, maxiter=500),
            knob="step_size",
            values=[0.3, 0.6, 1.0],
            seed=seed,
        )

    def go(self, systems: LinearSystemSequence, rounds: range) -> list[tuple[float | None, int]]:
        for t in rounds:
            A = ops.Diagonal(torch.tensor([0.5, 0.8, 1.0], dtype=FLOAT64) + 0.1 * math.sin(t))
            systems.solve(A, torch.ones(3, dtype=FLOAT64) + sampled(3, seed=t))
            systems.solve_transpose(A, sampled(3, seed=t))
        return [(step.value, step.info.iterations) for step in systems.history[-2 * len(rounds) :]]

    def test_goes_on_from_a_file_bit_for_bit(self):
        systems, copy, file = self.make(1), self.make(2), io.BytesIO()
        self.go(systems, range(20))
        torch.save(systems.state_dict(), file)
        file.seek(0)
        copy.load_state_dict(torch.load(file, weights_only=True))
        assert self.go(copy, range(20, 50)) == self.go(systems, range(20, 50))
        mine, theirs = systems.state_dict(), copy.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    def test_states_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"state has 'bandit.totals', for which this seq"):
            LinearSystemSequence(CG()).load_state_dict(self.make(0).state_dict())


class TestDerivatives:
    def test_go_through_the_solve_and_not_through_the_guess(self):
        b = sampled(N)
        systems = LinearSystemSequence(CG(rtol=1e-10))
        systems.solve(spd(), b)
        matrix = spd(0.1).to_dense().requires_grad_()
        x, info = systems.solve(ops.Dense(matrix, positive_definite=True), b)
        x.square().sum().backward()
        assert info.iterations > 0
        assert systems.history[-1].start < 0.5
        again = spd(0.1).to_dense().requires_grad_()
        torch.linalg.solve(again, b).square().sum().backward()
        symmetric = (again.grad + again.grad.T) / 2
        torch.testing.assert_close(
            (matrix.grad + matrix.grad.T) / 2, symmetric, rtol=1e-6, atol=1e-8
        )
        assert not systems.state_dict()["solution.1"].requires_grad

    def test_under_a_transform_nothing_of_it_is_kept(self):
        """What is remembered are plain values: a tensor that outlives its transform is an error."""
        A, systems = spd(), LinearSystemSequence(CG(rtol=1e-10))
        gradient = torch.func.grad(lambda b: systems.solve(A, b).value.square().sum())(sampled(N))
        expected = torch.func.grad(lambda b: torch.linalg.solve(A.to_dense(), b).square().sum())
        torch.testing.assert_close(gradient, expected(sampled(N)), rtol=1e-6, atol=1e-8)
        x, info = systems.solve(A, sampled(N))
        assert right(A, x, sampled(N))
        assert info.iterations == 0

    def test_under_vmap_there_is_nothing_to_remember(self):
        A, systems = spd(), LinearSystemSequence(CG(rtol=1e-10))
        block = torch.func.vmap(lambda b: systems.solve(A, b).value)(sampled(4, N))
        torch.testing.assert_close(block @ A.to_dense(), sampled(4, N), rtol=0, atol=1e-7)
        assert systems.state_dict() == {}


def test_relaxation_factors_of_a_sequence_of_shifted_laplacians():
    """SOR on the five-point Laplacian: late solves come close to the best fixed factor."""
    m, grid = 4, [1.0, 1.3, 1.6, 1.9]
    second = 2 * torch.eye(m) - torch.diag(torch.ones(m - 1), 1) - torch.diag(torch.ones(m - 1), -1)
    laplacian = torch.kron(second, torch.eye(m)) + torch.kron(torch.eye(m), second)
    laplacian = laplacian.to(FLOAT64)
    solver = SOR(rtol=1e-6, maxiter=10_000)
    systems = LinearSystemSequence(solver, knob="omega", values=grid, warm_start=None)
    generator = torch.Generator().manual_seed(0)
    late: dict[float, int] = dict.fromkeys(grid, 0)
    for t in range(200):
        shift = -0.3 + 0.6 * float(torch.rand((), generator=generator)) ** 2
        A = ops.Dense(laplacian + shift * torch.eye(m * m), positive_definite=True)
        b = torch.randn(m * m, generator=generator, dtype=FLOAT64)
        systems.solve(A, b)
        for omega in grid if t >= 170 else ():
            settings = dataclasses.replace(solver, omega=omega)
            late[omega] += settings.prepare(A).solve(b).info.iterations
    ours = sum(step.info.iterations for step in systems.history[170:])
    early = sum(step.info.iterations for step in systems.history[:30])
    assert ours < 1.1 * min(late.values())
    assert early > 1.3 * ours
