"""Hypergradients of logistic regression by CG: ours, JAXopt, lineax, TorchOpt, `hypergrad`.

Needs the peers: ``pip install -e '.[peers]'``; those that are missing are left out. All work in
float64 on one and the same problem, with as many iterations as bring their true residual below
1e-8 (JAX compiled and warm); what they return must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

import hyperlearn as hl
import operators as ops
from validation.bench.timing import Bench

RTOL = 1e-8


@dataclass(frozen=True)
class Logistic:
    """Penalised logistic regression at its minimum, with one penalty ``exp(x_j)`` a feature.

    ``inner = mean loss(A y, t) + sum exp(x_j) y_j^2 / 2``, and ``outer = mean loss(B y, s) +
    |x|^2 / 20``, which depends on x by itself too.
    """

    name: str
    A: Tensor
    t: Tensor
    B: Tensor
    s: Tensor
    x: Tensor
    y: Tensor

    @property
    def binary(self) -> bool:
        """Whether y is a vector."""
        return self.y.ndim == 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the samples."""
        if self.binary:
            return softplus(-targets * outputs).mean()
        return cross_entropy(outputs, targets)

    def inner(self, y: Tensor, x: Tensor) -> Tensor:
        """The inner loss."""
        penalty = x.exp() if self.binary else x.exp()[:, None]
        return self.loss(self.A @ y, self.t) + (penalty * y.square()).sum() / 2

    def outer(self, y: Tensor, x: Tensor) -> Tensor:
        """The outer loss."""
        return self.loss(self.B @ y, self.s) + x.square().sum() / 20

    def curvature(self) -> ops.LinearOperator:
        """The Hessian, as the Gauss-Newton matrix that it is for a model linear in y."""
        if self.binary:
            labels = (self.t + 1) / 2
            model = ops.GaussNewton(
                lambda y, data: data @ y, "binary-cross-entropy", self.y, self.A, labels
            )
        else:
            model = ops.GaussNewton(
                lambda y, data: data @ y, "cross-entropy", self.y, self.A, self.t
            )
        penalty = self.x.exp() if self.binary else self.x.exp()[:, None].expand_as(self.y)
        return model + ops.Diagonal(penalty.reshape(-1), ops.Space.of(self.y))


def problem(samples: int, features: int, classes: int = 0, seed: int = 0) -> Logistic:
    """A problem with y at the minimum of the inner loss, by Newton's method."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, B = draw(samples, features), draw(samples // 5, features)
    columns = max(classes, 1)
    truth = draw(features, columns) / features**0.5
    x = -4 + 0.5 * draw(features)
    targets = []
    for data in (A, B):
        scores = data @ truth + 0.5 * draw(len(data), columns)
        targets.append(scores.argmax(1) if classes else torch.sign(scores[:, 0]))
    y = torch.zeros((features, classes) if classes else (features,), dtype=torch.float64)
    name = f"{samples:,} x {features}" + (f" x {classes}" if classes else "")
    made = Logistic(name, A, targets[0], B, targets[1], x, y)
    for _ in range(20):
        gradient = torch.func.grad(made.inner)(made.y, x)
        if float(gradient.norm()) < 1e-12:
            break
        step = hl.solvers.CG(rtol=1e-10).prepare(made.curvature()).solve(gradient).value
        made = Logistic(name, A, targets[0], B, targets[1], x, made.y - step)
    return made


def hypergradients(bench: Bench) -> None:
    """One whole hypergradient on two problems."""
    for case in (problem(10_000, 200), problem(5000, 784, 10)):
        rivals: dict[str, Callable[[], object]] = {
            "ours, Gauss-Newton": lambda c=case: ours(c, c.curvature()),
            "ours, Hessian": lambda c=case: ours(c, None),
            "ours, and the error estimated": lambda c=case: ours(c, None, estimate=True),
            "torch by hand": lambda c=case: by_hand(c),
        }
        rivals |= of_jax(bench, case)
        rivals |= of_torchopt(bench, case)
        bench.compare(
            f"Hypergradient of logistic regression, {case.name}, float64, CG to {RTOL:g}",
            rivals,
            lambda medians, c=case: note(c, medians),
            tolerance=1e-6,
            beside=of_hypergrad(bench, case),
        )


def ours(case: Logistic, operator: ops.LinearOperator | None, *, estimate: bool = False) -> Tensor:
    """With its certificate: the residual in the exact Hessian, and the inner gradient."""
    gradient, certificate = hl.hypergradient(
        case.outer, case.inner, case.y, case.x, operator=operator,
        solver=hl.solvers.CG(rtol=RTOL), estimate=estimate,
    )  # fmt: skip
    assert certificate.converged
    return gradient


def by_hand(case: Logistic) -> Tensor:
    """Double backward with the graph kept, and a plain CG."""
    y, x = case.y.clone().requires_grad_(), case.x.clone().requires_grad_()
    b, direct = torch.autograd.grad(case.outer(y, x), (y, x))
    (g,) = torch.autograd.grad(case.inner(y, x), y, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(g, y, v, retain_graph=True)[0]

    q, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), (r * r).sum()
    stop = RTOL**2 * rr
    while rr > stop:
        Ap = product(p)
        step = rr / (p * Ap).sum()
        q, r = q + step * p, r - step * Ap
        rr, before = (r * r).sum(), rr
        p = r + (rr / before) * p
    return direct - torch.autograd.grad(g, x, q)[0]


def of_jax(bench: Bench, case: Logistic) -> dict[str, Callable[[], object]]:
    """JAXopt's `root_vjp`, and the adjoint of optimistix by lineax."""
    if bench.optional("jax") is None:
        return {}
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    A, t, B, s = (jnp.asarray(v.numpy()) for v in (case.A, case.t, case.B, case.s))
    y, x = jnp.asarray(case.y.numpy()), jnp.asarray(case.x.numpy())

    def loss(outputs: Any, targets: Any) -> Any:
        if case.binary:
            return jax.nn.softplus(-targets * outputs).mean()
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], 1)
        return -chosen.mean()

    def inner(y: Any, x: Any) -> Any:
        penalty = jnp.exp(x) if case.binary else jnp.exp(x)[:, None]
        return loss(A @ y, t) + (penalty * y**2).sum() / 2

    def outer(y: Any, x: Any) -> Any:
        return loss(B @ y, s) + (x**2).sum() / 20

    stationarity = jax.grad(inner)
    found: dict[str, Callable[[], object]] = {}
    if (jaxopt := bench.optional("jaxopt")) is not None:

        def solve(matvec: Any, b: Any) -> Any:
            return jaxopt.linear_solve.solve_cg(matvec, b, tol=RTOL, maxiter=1000)

        @jax.jit
        def by_jaxopt(y: Any, x: Any) -> Any:
            b, direct = jax.grad(outer, (0, 1))(y, x)
            (implicit,) = jaxopt.implicit_diff.root_vjp(stationarity, y, (x,), b, solve=solve)
            return direct + implicit

        found["JAXopt"] = lambda: np.asarray(by_jaxopt(y, x))
    if (lx := bench.optional("lineax")) is not None:

        @jax.jit
        def by_lineax(y: Any, x: Any) -> Any:
            b, direct = jax.grad(outer, (0, 1))(y, x)
            operator = lx.JacobianLinearOperator(
                lambda y, _: stationarity(y, x), y, tags=lx.positive_semidefinite_tag
            )
            operator = lx.linearise(operator)
            q = lx.linear_solve(operator, b, lx.CG(rtol=RTOL, atol=0.0, max_steps=1000)).value
            return direct - jax.vjp(lambda x: stationarity(y, x), x)[1](q)[0]

        found["lineax (the adjoint of optimistix)"] = lambda: np.asarray(by_lineax(y, x))
    return found


def of_torchopt(bench: Bench, case: Logistic) -> dict[str, Callable[[], object]]:
    """TorchOpt's `custom_root`."""
    if (torchopt := bench.optional("torchopt")) is None:
        return {}

    def stationarity(y: Tensor, x: Tensor) -> Tensor:
        return torch.func.grad(case.inner)(y, x)

    @torchopt.diff.implicit.custom_root(  # type: ignore[untyped-decorator]
        stationarity,
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(rtol=RTOL, atol=0.0, maxiter=1000),
    )
    def minimiser(y: Tensor, x: Tensor) -> Tensor:
        return case.y.clone()

    def run() -> Tensor:
        x = case.x.clone().requires_grad_()
        case.outer(minimiser(case.y.clone(), x), x).backward()
        assert x.grad is not None
        return x.grad

    return {"TorchOpt": run}


def of_hypergrad(bench: Bench, case: Logistic) -> dict[str, Callable[[], object]]:
    """The Nystrom method of Hataya and Yamada in its authors' package: it has no tolerance."""
    if (package := bench.optional("hypergrad.approx_hypergrad")) is None:
        return {}

    def inner(y: Any, x: Any) -> Tensor:
        return case.inner(y[0], x[0])

    def outer(y: Any, x: Any) -> Tensor:
        return case.outer(y[0], x[0])

    def run(rank: int) -> Tensor:
        torch.manual_seed(0)
        (gradient,) = package.nystrom(inner, outer, (case.y,), (case.x,), rank=rank, rho=0.01)
        return gradient

    exact = by_hand(case)
    error = float((run(50) - exact).norm() / exact.norm())
    return {f"hypergrad, Nystrom of rank 50 ({error:.1e} off)": lambda: run(50)}


def note(case: Logistic, medians: dict[str, float]) -> str:
    """What the least work is."""
    solver = hl.solvers.CG(rtol=RTOL).prepare(case.curvature())
    b = torch.func.grad(case.outer)(case.y, case.x)
    info = solver.solve(b).info
    size = case.A.numel() * 8 / 1e6
    mine = medians["ours, Gauss-Newton"]
    passes = 2 * info.products
    return (
        f"{info.iterations} iterations, true residual {info.residual:.1e}: {passes} passes over "
        f"the {size:.0f} MB of A; ours takes {1e3 * mine / passes:.2f} ms a pass, "
        f"{passes * size / 1e3 / mine:.0f} GB/s"
    )
