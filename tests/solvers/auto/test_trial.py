"""How long an iteration of unknown length is tried, and when it goes on."""

from __future__ import annotations

import math

import pytest
import torch

import operators as ops
import solvers
from solvers.auto import costs
from solvers.auto.automatic import PreparedAuto
from solvers.auto.plan import SHORTEST_TRIAL, Candidate, Plan
from solvers.auto.trial import Trial
from tests.solvers.systems import known_by_products

DOUBLE = torch.float64


def trial(each: float = 1e-3, direct: float = 1.0, solves: int = 1, columns: int = 1) -> Trial:
    open_ended = Candidate(solvers.CG(), "open", iteration=each, trial=1)
    known = Candidate(solvers.DenseLU(), "known", setup=direct)
    return Trial(open_ended, known, solves, columns, start=1e8)


def test_the_trial_is_a_share_of_what_follows():
    assert trial().iterations == int(costs.TRIAL / 1e-3)
    assert trial(columns=4, solves=4).iterations == int(costs.TRIAL / 4e-3)
    assert trial(each=1.0).iterations == 0


@pytest.mark.parametrize("rate", [0.9, 0.97])
def test_what_promises_goes_on_until_it_is_done(rate):
    """Linear convergence that takes less than what follows is never given up."""
    one = trial()
    done = one.iterations
    while done < 2000:
        distance = 1e8 * rate**done
        if distance <= 1:
            break
        more = one.more(done, distance)
        assert more > 0
        done += more
    assert done <= 2 * math.log(1e-8) / math.log(rate)


def test_what_does_not_promise_ends():
    one = trial()
    assert one.more(one.iterations, 1e8 * 0.995**one.iterations) == 0
    assert one.more(one.iterations, 1e9) == 0  # it grew
    assert one.more(one.iterations, float("nan")) == 0
    early = one.iterations // 3
    assert one.more(early, 1e8 * 0.999**early) == 0  # hopeless
    assert one.more(early, 2e8) == one.iterations - early  # at first a residual may grow


def test_the_other_right_hand_sides_count():
    """With a thousand more to come a factorisation pays where for one it does not."""
    done = trial().iterations
    distance = 1e8 * 0.97**done
    assert trial().more(done, distance) > 0
    assert trial(solves=1000).more(done, distance) == 0


def test_it_is_one_iteration_and_not_restarted():
    """CG on trial makes the iterates of CG: as many products, and the same solution."""
    values = torch.linspace(1, 100, 400, dtype=DOUBLE)
    A = ops.Diagonal(values)
    b = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    for solver in (solvers.CG(rtol=1e-8), solvers.MINRES(rtol=1e-8), solvers.BiCGStab(rtol=1e-8)):
        member = solver.prepare(A)
        whole = member.solve(b)
        candidate = Candidate(solver, "open", iteration=1e-6, trial=1)
        known = Candidate(solvers.DenseLU(), "known", setup=1e-4 * SHORTEST_TRIAL)
        with Trial(candidate, known, 1, 1, start=1e8).of(member):
            tried = member.solve(b)
        assert member.trial is None
        assert tried.info.iterations == whole.info.iterations > SHORTEST_TRIAL
        torch.testing.assert_close(tried.value, whole.value, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [solvers.GMRES(rtol=1e-8), solvers.LSMR(rtol=1e-8)], ids=repr)
def test_the_others_are_right_too(solver):
    A = ops.Diagonal(torch.linspace(1, 5, 60, dtype=DOUBLE))
    b = torch.ones(60, dtype=DOUBLE)
    candidate = Candidate(solver, "open", iteration=1e-6, trial=1)
    known = Candidate(solvers.DenseLU(), "known", setup=1e-4 * SHORTEST_TRIAL)
    member = solver.prepare(A)
    with Trial(candidate, known, 1, 1, start=1e8).of(member):
        x, info = member.solve(b)
    assert info.converged
    torch.testing.assert_close(x, b / A.values, rtol=1e-6, atol=0)


def test_a_block_that_a_trial_is_not_worth_goes_to_the_next():
    """What iterates for one column may be too dear for many; a factorisation is not."""
    n = 300
    A = known_by_products(torch.linspace(1, 2, n, dtype=DOUBLE), positive_definite=True)
    candidates = (
        Candidate(solvers.CG(rtol=1e-8), "open", iteration=1e-3, trial=50),
        Candidate(solvers.DenseLU(rtol=1e-8), "known", setup=1.0),
    )
    prepared = PreparedAuto(solvers.Auto(rtol=1e-8), A, Plan("A", candidates, solves=2))
    assert "CG" in prepared.solve(torch.ones(n, dtype=DOUBLE)).info.solver
    info = prepared.solve(torch.ones(n, 200, dtype=DOUBLE)).info
    assert "DenseLU" in info.solver
    assert info.converged
    assert "CG" not in info.reason  # it was not tried
