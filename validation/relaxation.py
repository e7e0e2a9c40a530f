"""Relaxation factors learned from iteration counts, after "Learning to Relax" (ICLR 2024).

    python -m validation.relaxation [--rounds N] [--trials N] [--steps N]

Two experiments of Khodak, Chow, Balcan and Talwalkar, arXiv:2310.02246. First SOR on the 10 x 10
five-point Laplacian with a random shift, whose iteration counts a bandit has to do with. Then
SSOR-CG within Crank-Nicolson steps of a heat equation, by `LinearSystemSequence`. Prints tables and
verdicts and writes everything to ``runs/validation/relaxation.h5``. About six minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import operators as ops
from solvers.krylov.cg import CG
from solvers.preconditioners.ssor import SSOR
from solvers.sequences.bandit import Bandit, TsallisINF
from solvers.sequences.contextual import BinnedBandit, ChebyshevBandit
from solvers.sequences.sequence import LinearSystemSequence
from solvers.stationary.sor import SOR, optimal_omega

REPORT = Path("runs/validation/relaxation.h5")
OMEGAS = torch.linspace(1, 1.95, 20, dtype=torch.float64)
FIXED = (1.0, 1.2, 1.4, 1.6, 1.8)
POINTS = 10
# Shifts of the Laplacian are -0.15 + 0.6 Beta(a, b); contexts are taken to lie in this interval.
STREAMS = {"low": (2.0, 6.0), "high": (0.5, 1.5)}
INTERVAL = (-0.15, 0.65)
LEARNERS: dict[str, Callable[[float, float, int], Bandit]] = {
    "Tsallis-INF": lambda low, high, seed: TsallisINF(len(OMEGAS), seed=seed),
    "Tsallis-INF, 5 bins": lambda low, high, seed: BinnedBandit(len(OMEGAS), low, high, seed=seed),
    "ChebCB": lambda low, high, seed: ChebyshevBandit(len(OMEGAS), low, high, seed=seed),
}
# What an earlier port found on the low-variance stream of 1,500 rounds (first and last 300; all).
KNOWN = {"first 300": 102.7, "last 300": 60.7, 1.0: 280.0, 1.4: 115.0, 1.6: 65.0, 1.8: 86.0}


@dataclass(frozen=True)
class Stream:
    """Instances ``(A + shift I) x = b`` and what SOR takes for them.

    `counts` is ``(20, rounds)``, a row for each of `OMEGAS`; `optimal` is the count with the
    asymptotically best omega of each instance.
    """

    shifts: Tensor
    counts: Tensor
    optimal: Tensor

    @classmethod
    def sampled(cls, kind: str, rounds: int, seed: int) -> Stream:
        rng = np.random.default_rng(seed)
        shifts = torch.from_numpy(-0.15 + 0.6 * rng.beta(*STREAMS[kind], size=rounds))
        n = POINTS**2
        # A standard Gaussian vector, drawn again until it is no longer than sqrt(n).
        kept = np.empty((0, n))
        while len(kept) < rounds:
            drawn = rng.normal(size=(rounds, n))
            kept = np.concatenate([kept, drawn[np.linalg.norm(drawn, axis=1) <= math.sqrt(n)]])
        b = torch.from_numpy(kept[:rounds].T.copy())
        best = torch.tensor([optimal_omega(beta) for beta in jacobi_radius(shifts).tolist()])
        omegas = torch.cat([OMEGAS.repeat_interleave(rounds), best.double()])
        every = len(OMEGAS) + 1
        counts = iterations(shifts.repeat(every), omegas, b.repeat(1, every)).reshape(every, rounds)
        agree(shifts, b, counts)
        return cls(shifts, counts[:-1], counts[-1])


def jacobi_radius(shift: Tensor) -> Tensor:
    """Spectral radius of Jacobi's iteration for the shifted Laplacian."""
    return 4 * math.cos(math.pi / (POINTS + 1)) / (4 + shift)


def iterations(shift: Tensor, omega: Tensor, b: Tensor, limit: int = 10_000) -> Tensor:
    """Sweeps of SOR from zero until ``|r| < 1e-8 |b|``, one count for each column of b."""
    beta = omega * jacobi_radius(shift)
    real = beta**2 - 4 * (omega - 1)
    rate = torch.where(real > 0, (beta + real.clamp_min(0).sqrt()) ** 2 / 4, omega - 1)
    counts = torch.empty(len(shift), dtype=torch.int64)
    # Columns that take about as long as each other go together.
    for part in rate.argsort().split(512):
        counts[part] = _swept(4 + shift[part], omega[part], b[:, part], limit)
    return counts


def _swept(diagonal: Tensor, omega: Tensor, b: Tensor, limit: int) -> Tensor:
    """A sweep solves ``M d = r`` with ``M = D / omega + L``, and leaves ``r = (M - A) d``.

    In the order of the unknowns by rows each waits for its left and its lower neighbour, so those
    on one antidiagonal go at once. The grid of d has a border of zeros.
    """
    m, columns = POINTS, b.shape[1]
    counts, index = torch.full((columns,), limit), torch.arange(columns)
    inverse, left_over = omega / diagonal, (1 / omega - 1) * diagonal
    targets = 1e-8 * torch.linalg.vector_norm(b, dim=0)
    r, d = b.reshape(m, m, columns).clone(), b.new_zeros(m + 2, m + 2, columns)
    for sweep in range(1, limit + 1):
        rows, padded = r.reshape(m * m, -1), d.reshape((m + 2) ** 2, -1)
        for s in range(2 * m - 1):
            first, last = max(0, s - m + 1), min(s, m - 1)
            of_r = slice(first * m + s - first, last * m + s - last + 1, m - 1)
            at = (first + 1) * (m + 2) + s - first + 1
            length = (last - first) * (m + 1) + 1
            here, above, beside = (
                padded[start : start + length : m + 1] for start in (at, at - m - 2, at - 1)
            )
            torch.add(rows[of_r], above, out=here)
            here.add_(beside).mul_(inverse)
        torch.mul(d[1:-1, 1:-1], left_over, out=r)
        r.add_(d[2:, 1:-1]).add_(d[1:-1, 2:])
        done = torch.linalg.vector_norm(r, dim=(0, 1)) < targets
        if bool(done.any()):
            counts[index[done]] = sweep
            r, d = r[:, :, ~done].contiguous(), d[:, :, ~done].contiguous()
            inverse, left_over, targets, index = (
                vector[~done] for vector in (inverse, left_over, targets, index)
            )
            if not len(index):
                break
    return counts


def agree(shifts: Tensor, b: Tensor, counts: Tensor) -> None:
    """Raise unless `solvers` takes as many iterations, on some of the instances."""
    m, one = POINTS, torch.ones(POINTS - 1, dtype=torch.float64)
    second = 2 * torch.eye(m, dtype=torch.float64) - torch.diag(one, 1) - torch.diag(one, -1)
    identity = torch.eye(m, dtype=torch.float64)
    laplacian = torch.kron(second, identity) + torch.kron(identity, second)
    for t in range(0, len(shifts), math.ceil(len(shifts) / 5)):
        A = ops.Dense(laplacian + shifts[t] * torch.eye(m * m), positive_definite=True)
        for arm in (0, 8, 12, 19):
            solver = SOR(omega=float(OMEGAS[arm]), rtol=1e-8, maxiter=10_000)
            taken = solver.prepare(A).solve(b[:, t]).info.iterations
            if abs(taken - int(counts[arm, t])) > 1:
                raise AssertionError(f"{solver}: {taken} iterations; expected {counts[arm, t]}")


def play(bandit: Bandit, stream: Stream, order: Tensor) -> Tensor:
    """What each round costs."""
    table, shifts, costs = stream.counts.tolist(), stream.shifts.tolist(), []
    for instance in order.tolist():
        costs.append(table[bandit.choose(shifts[instance])][instance])
        bandit.learn(costs[-1])
    return torch.tensor(costs)


def relaxation(console: Console, file: h5py.File, kind: str, rounds: int, trials: int) -> bool:
    """One stream: every learner on it in several orders, beside what a fixed omega costs."""
    stream = Stream.sampled(kind, rounds, seed=0)
    shuffled = [torch.Generator().manual_seed(trial) for trial in range(trials)]
    orders = torch.stack([torch.randperm(rounds, generator=g) for g in shuffled])
    best = int(stream.counts.double().mean(1).argmin())
    paid = {f"omega = {omega}": stream.counts[arm_of(omega)][orders] for omega in FIXED}
    paid[f"best fixed omega, {OMEGAS[best]:.2f}"] = stream.counts[best][orders]
    for name, make in LEARNERS.items():
        runs = [play(make(*INTERVAL, trial), stream, order) for trial, order in enumerate(orders)]
        paid[name] = torch.stack(runs)
    paid["omega by Young's formula"] = stream.optimal[orders]
    paid["best omega of the grid"] = stream.counts.min(0).values[orders]

    phases = {"first 300": slice(300), "last 300 of 1,500": slice(1200, 1500)}
    phases |= {"last 300": slice(-300, None), "all": slice(None)}
    table = Table(
        title=f"SOR, {kind}-variance stream: mean iterations, {rounds:,} rounds, {trials} trials "
        "(± standard deviation over trials)",
        title_justify="left",
    )
    for column in ("", *phases):
        table.add_column(column)
    means = {}
    for name, costs in paid.items():
        means[name] = {
            phase: costs[:, part].double().mean(1).numpy() for phase, part in phases.items()
        }
        table.add_row(name, *(f"{x.mean():.1f} ± {x.std():.1f}" for x in means[name].values()))
        file[f"{kind}/costs/{name}"] = costs.numpy()
    file[f"{kind}/counts"], file[f"{kind}/shifts"] = stream.counts.numpy(), stream.shifts.numpy()
    file[f"{kind}/orders"] = orders.numpy()
    console.print(table)
    if kind == "low":
        known(console, stream, means["Tsallis-INF"], orders)

    late = {name: float(phase["last 300"].mean()) for name, phase in means.items()}
    fixed = late[f"best fixed omega, {OMEGAS[best]:.2f}"]
    cheb, tsallis = late["ChebCB"], late["Tsallis-INF"]
    sound = cheb < tsallis <= 1.1 * fixed
    console.print(
        f"last 300 rounds: ChebCB {cheb:.1f}, Tsallis-INF {tsallis:.1f} = {tsallis / fixed:.3f} "
        f"times the best fixed omega; ChebCB < Tsallis-INF <= 1.1 best fixed: "
        f"{'yes' if sound else 'NO'}\n"
    )
    return sound


def known(console: Console, stream: Stream, learner: dict[str, np.ndarray], orders: Tensor) -> None:
    """Figures on record for 1,500 rounds beside ours."""
    table = Table(title="1,500 rounds of the low-variance stream", title_justify="left")
    for column in ("", "on record", "here", "± a trial"):
        table.add_column(column)
    first, last = learner["first 300"], learner["last 300 of 1,500"]
    ours = {"Tsallis-INF, first 300": (KNOWN["first 300"], first)}
    ours["Tsallis-INF, last 300"] = (KNOWN["last 300"], last)
    for omega in (1.0, 1.4, 1.6, 1.8):
        costs = stream.counts[arm_of(omega)][orders[:, :1500]].double().mean(1).numpy()
        ours[f"omega = {omega}"] = (KNOWN[omega], costs)
    for name, (figure, values) in ours.items():
        table.add_row(name, f"{figure:g}", f"{values.mean():.1f}", f"{values.std():.1f}")
    console.print(table)


def arm_of(omega: float) -> int:
    return int((OMEGAS - omega).abs().argmin())


@dataclass
class Heat:
    """Crank-Nicolson for ``u_t = kappa(t) laplace u + f(t, x)`` on the unit square, 0 at its edge.

    The diffusion kappa is ``0.1 sin 2 pi t`` where that is positive, else ``-10 sin 2 pi t``; the
    source is a smooth bump on a circular course, the start one in the middle.
    """

    points: int
    step: float = 1e-3

    def __post_init__(self) -> None:
        m = self.points - 1
        second = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(m, m))
        matrix = self.points**2 * scipy.sparse.kronsum(second, second, format="csr")
        self.laplacian = ops.Sparse(matrix, symmetric=True, positive_definite=True)
        axis = torch.arange(1, self.points, dtype=torch.float64) / self.points
        self.grid = torch.cartesian_prod(axis, axis)

    def diffusion(self, time: float) -> float:
        sine = math.sin(2 * math.pi * time)
        return max(0.1 * sine, -10 * sine)

    def run(self, systems: LinearSystemSequence, steps: int) -> Tensor:
        """Iterations of each step."""
        u, identity = bump(self.grid, (0.5, 0.5), 0.25), ops.Identity(len(self.grid), torch.float64)
        for k in range(steps):
            time = self.step * k
            middle = time + self.step / 2
            course = 16 * math.pi * middle
            centre = (0.5 + math.cos(course) / 4, 0.5 + math.sin(course) / 4)
            half = 0.5 * self.step * self.diffusion(middle) * self.laplacian
            b = u - half @ u + 32 * self.step * bump(self.grid, centre, 0.125)
            u = systems.solve(identity + half, b, context=self.diffusion(time)).value
        return torch.tensor([step.info.iterations for step in systems.history])


def bump(x: Tensor, centre: tuple[float, float], radius: float) -> Tensor:
    """Smooth, 1 at the centre and 0 beyond the radius."""
    square = ((x - torch.tensor(centre, dtype=x.dtype)) ** 2).sum(1) / radius**2
    return torch.exp(1 - 1 / (1 - square.clamp_max(1)))


def heat(console: Console, file: h5py.File, points: int, steps: int) -> None:
    """Iterations of CG in all steps: plain, with fixed omegas, with learned ones."""
    ways: dict[str, LinearSystemSequence] = {"CG": LinearSystemSequence(CG(rtol=1e-8))}
    for omega in (1.0, 1.5, 1.95):
        settings = CG(rtol=1e-8, preconditioner=SSOR(omega=omega))
        ways[f"SSOR-CG, omega = {omega}"] = LinearSystemSequence(settings, recycle=False)
    for name, make in LEARNERS.items():
        ways[name] = LinearSystemSequence(
            CG(rtol=1e-8, preconditioner=SSOR()),
            knob="preconditioner.omega",
            values=OMEGAS.tolist(),
            bandit=make(0.0, 10.0, 0),
        )
    table = Table(
        title=f"Heat equation, {points - 1} x {points - 1} unknowns, {steps:,} steps of "
        "Crank-Nicolson",
        title_justify="left",
    )
    for column in ("", "iterations", "a step, first tenth", "a step, last tenth", "CPU seconds"):
        table.add_column(column)
    for name, systems in ways.items():
        start = time.process_time()
        counts = Heat(points).run(systems, steps)
        seconds, tenth = time.process_time() - start, max(steps // 10, 1)
        first, last = (float(part.double().mean()) for part in (counts[:tenth], counts[-tenth:]))
        table.add_row(
            name, f"{int(counts.sum()):,}", f"{first:.1f}", f"{last:.1f}", f"{seconds:.1f}"
        )
        group = file.create_group(f"heat/{points}/{name}")
        group["iterations"], group.attrs["CPU seconds"] = counts.numpy(), seconds
        if systems.values is not None:
            group["omega"] = np.array([step.value for step in systems.history])
    console.print(table)


def main(arguments: list[str] | None = None) -> bool:
    """Run, print, write the report; returns whether the claims about the late phase hold."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.relaxation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5000, help="instances of a stream, >= 1500")
    parser.add_argument("--trials", type=int, default=8, help="orders of a stream")
    parser.add_argument("--steps", type=int, default=1000, help="of the heat equation")
    options = parser.parse_args(arguments)
    if options.rounds < 1500 or options.trials < 1 or options.steps < 1:
        parser.error("expected rounds >= 1500, trials >= 1, steps >= 1")
    torch.set_num_threads(1)
    console = Console(width=120)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(REPORT, "w") as file:
        sound = [
            relaxation(console, file, kind, options.rounds, options.trials) for kind in STREAMS
        ]
        for points in (25, 50, 100):
            heat(console, file, points, options.steps)
    console.print(f"written to {REPORT}")
    return all(sound)


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
