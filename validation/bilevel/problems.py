"""The zoo: bilevel problems, each written once for torch, jax.numpy and numpy alike.

A problem's functions take the array namespace, y, x and the data. Beside the inner problem stands
its optimality map F, differentiated by hand, from which the reference is made (`extended`). The
outer loss depends on x directly in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import hyperlearn as hl
from validation.bilevel.extended import Reference, reference

Function = Callable[..., Any]  # (namespace, y, x, data)
MNIST = Path("data/mnist.h5")


@dataclass(frozen=True)
class Problem:
    """An inner and an outer problem with their data.

    Parameters
    ----------
    family, label
        What it is, and which one of these.
    kind
        What `inner` is: the loss of an ``"argmin"``, the residual of a ``"root"``, the map of a
        ``"fixed point"``, the residuals of ``"least squares"``; ``"proximal"`` and ``"kkt"`` are
        argmins with more to them.
    inner, outer
        ``f(namespace, y, x, data)``.
    F
        Optimality by hand; of y and multipliers in a ``"kkt"``.
    data, y0, x
        In numbers of `dtype`.
    options
        What `hyperlearn.argmin` needs besides: penalty, constraint, equality, inequality.
    extra
        Multipliers to start from.
    steps
        Plain iterations ``z <- z - F(z)`` before Newton's, where F is that of a fixed point.
    minimum
        Whether F = 0 is a minimum there; if not, a hypergradient must be flagged.
    batches
        Data of the inner loss, a mean over their rows, that can be handed over as a batch.
    """

    family: str
    label: str
    kind: str
    inner: Function
    outer: Function
    F: Function
    data: dict[str, np.ndarray]
    y0: np.ndarray
    x: np.ndarray
    dtype: str = "float64"
    options: Callable[[SimpleNamespace], dict[str, Any]] = lambda data: {}
    extra: np.ndarray = field(default_factory=lambda: np.zeros(0))
    steps: int = 0
    minimum: bool = True
    batches: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Family, label and dtype."""
        return f"{self.family}, {self.label}, {self.dtype}"

    @property
    def smooth(self) -> bool:
        """Whether the inner problem is the minimum of a smooth loss, without constraints."""
        return self.kind in ("argmin", "least squares")

    def single(self) -> Problem:
        """The same in float32: its data are rounded, and it has a reference of its own."""
        small = {name: _rounded(value) for name, value in self.data.items()}
        return replace(self, dtype="float32", data=small, y0=_rounded(self.y0), x=_rounded(self.x))

    def on(self, convert: Callable[[np.ndarray], Any]) -> SimpleNamespace:
        """The data as another library's arrays."""
        return SimpleNamespace(**{name: convert(value) for name, value in self.data.items()})

    @cached_property
    def reference(self) -> Reference:
        """Of the hypergradient, in extended precision."""
        double = self.on(lambda v: v.astype(float) if v.dtype.kind == "f" else v)
        z, x = np.concatenate([self.y0, self.extra]).astype(float), self.x.astype(float)
        for _ in range(self.steps):
            z = z - self.F(np, z, x, double)
        wide = self.on(lambda v: v.astype(np.longdouble) if v.dtype.kind == "f" else v)
        return reference(
            lambda z, x: self.F(np, z, x, wide),
            lambda y, x: self.outer(np, y, x, wide),
            z, x, len(self.y0),
        )  # fmt: skip

    @property
    def solution(self) -> np.ndarray:
        """y* in 80-bit numbers."""
        return self.reference.z[: len(self.y0)]

    def loss(self, xp: Any, y: Any, x: Any, data: SimpleNamespace) -> Any:
        """The inner loss as a scalar, where the inner problem is an argmin."""
        value = self.inner(xp, y, x, data)
        return xp.sum(value**2) / 2 if self.kind == "least squares" else value


def _rounded(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype.kind == "f" else value


def softplus(xp: Any, z: Any) -> Any:
    """``log(1 + e^z)``; z is moderate here."""
    return xp.log1p(xp.exp(z))


def sigmoid(xp: Any, z: Any) -> Any:
    """``1 / (1 + e^-z)``."""
    return 1 / (1 + xp.exp(-z))


def log_cosh(xp: Any, z: Any) -> Any:
    """``log cosh z``, of any size: autograd's second derivative of the plain one overflows."""
    size = xp.where(z.real > 0, z, -z)
    return size + xp.log1p(xp.exp(-2 * size)) - np.log(2.0)


def spectrum(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """A symmetric matrix with these eigenvalues, its eigenvectors drawn."""
    Q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    M = (Q * values) @ Q.T
    return (M + M.T) / 2


def _sets(rng: np.random.Generator, m: int, n: int) -> dict[str, np.ndarray]:
    """Features, a truth, targets, for training and validation."""
    A, B, truth = rng.standard_normal((m, n)), rng.standard_normal((m // 2, n)), rng.normal(size=n)
    noise = 0.3 * rng.standard_normal(m), 0.3 * rng.standard_normal(m // 2)
    return {"A": A, "B": B, "t": A @ truth + noise[0], "s": B @ truth + noise[1]}


# --- regressions: mean loss of a linear model + penalties that x sets -----------------------------


def regression(
    family: str, label: str, rng: np.random.Generator, m: int, n: int, scalar: bool = False
) -> Problem:
    """``mean_i l(a_i^T y, t_i) + sum_j e^{x_j} y_j^2 / 2``; the outer loss is l on other data."""
    data = _sets(rng, m, n)
    if family == "logistic":
        data["t"], data["s"] = np.sign(data["t"]), np.sign(data["s"])
    elif family == "Poisson":
        data["A"], data["B"] = data["A"] / n**0.5, data["B"] / n**0.5
        data["t"] = rng.poisson(2.0, m).astype(float)
        data["s"] = rng.poisson(2.0, m // 2).astype(float)
    elif family in ("Huber", "pseudo-Huber", "log-cosh"):
        data["t"][::7] += 8.0  # outliers
    loss, slope = LOSSES[family]

    def inner(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean(loss(xp, d.A @ y, d.t)) + xp.sum(xp.exp(x) * y * y) / 2

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return d.A.T @ slope(xp, d.A @ y, d.t) / m + xp.exp(x) * y

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean(loss(xp, d.B @ y, d.s)) + xp.sum(xp.sin(x)) / 10

    x = rng.normal(size=1 if scalar else n) / 2 - 2
    return Problem(family, label, "argmin", inner, outer, F, data, np.zeros(n), x,
                   batches=("A", "t"))  # fmt: skip


def _huber(xp: Any, z: Any, t: Any) -> Any:
    r = z - t
    inside = (r.real < 1) & (r.real > -1)
    return xp.where(inside, r * r / 2, xp.where(r.real > 0, r - 0.5, -r - 0.5))


def _huber_slope(xp: Any, z: Any, t: Any) -> Any:
    r = z - t
    one = xp.ones_like(r)
    return xp.where(r.real > 1, one, xp.where(r.real < -1, -one, r))


# Loss and its derivative in the model's output.
LOSSES: dict[str, tuple[Function, Function]] = {
    "ridge": (lambda xp, z, t: (z - t) ** 2 / 2, lambda xp, z, t: z - t),
    "logistic": (
        lambda xp, z, t: softplus(xp, -t * z),
        lambda xp, z, t: -t * sigmoid(xp, -t * z),
    ),
    "Poisson": (lambda xp, z, t: xp.exp(z) - t * z, lambda xp, z, t: xp.exp(z) - t),
    "Huber": (_huber, _huber_slope),
    "pseudo-Huber": (
        lambda xp, z, t: xp.sqrt(1 + (z - t) ** 2) - 1,
        lambda xp, z, t: (z - t) / xp.sqrt(1 + (z - t) ** 2),
    ),
    "log-cosh": (
        lambda xp, z, t: log_cosh(xp, z - t),
        lambda xp, z, t: xp.tanh(z - t),
    ),
}


def softmax(label: str, data: dict[str, np.ndarray], k: int, weights: bool) -> Problem:
    """Softmax regression: penalties of each feature, or (`weights`) a weight ``s(x_i)`` a sample.

    Targets T, S are one-hot rows.
    """
    m, n = data["A"].shape

    def log_losses(xp: Any, scores: Any, targets: Any) -> Any:
        return xp.log(xp.sum(xp.exp(scores), -1)) - xp.sum(scores * targets, -1)

    def penalty(xp: Any, x: Any) -> Any:
        return 0.05 if weights else xp.exp(x)[:, None]

    def inner(xp: Any, y: Any, x: Any, d: Any) -> Any:
        Y = y.reshape(n, k)
        losses = log_losses(xp, d.A @ Y, d.T)
        share = sigmoid(xp, x) if weights else 1.0
        return xp.mean(share * losses) + xp.sum(penalty(xp, x) * Y * Y) / 2

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        Y = y.reshape(n, k)
        e = xp.exp(d.A @ Y)
        slopes = e / xp.sum(e, -1)[:, None] - d.T
        if weights:
            slopes = sigmoid(xp, x)[:, None] * slopes
        return (d.A.T @ slopes / m + penalty(xp, x) * Y).reshape(-1)

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean(log_losses(xp, d.B @ y.reshape(n, k), d.S)) + xp.sum(x * x) / 100

    rng = np.random.default_rng(m * n)
    x = rng.normal(size=m) if weights else rng.normal(size=n) / 2 - 2
    family = "data weights" if weights else "softmax"
    return Problem(family, label, "argmin", inner, outer, F, data, np.zeros(n * k), x)


def _classes(rng: np.random.Generator, m: int, n: int, k: int) -> dict[str, np.ndarray]:
    A, B, truth = rng.normal(size=(m, n)), rng.normal(size=(m // 2, n)), rng.normal(size=(n, k))
    one_hot = np.eye(k)
    return {
        "A": A, "B": B,
        "T": one_hot[(A @ truth + rng.normal(size=(m, k))).argmax(1)],
        "S": one_hot[(B @ truth + rng.normal(size=(m // 2, k))).argmax(1)],
    }  # fmt: skip


def mnist(count: int = 60, k: int = 3) -> dict[str, np.ndarray] | None:
    """Small images of the digits 0 to k - 1, 7 x 7; None where the file is not there."""
    import h5py

    if not MNIST.exists():
        return None
    with h5py.File(MNIST) as file:
        images, labels = file["train/images"][:2000], file["train/labels"][:2000]
    chosen = np.flatnonzero(labels < k)[: count + count // 2]
    small = images[chosen].reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(-1, 49) / 255
    targets = np.eye(k)[labels[chosen]]
    return {"A": small[:count], "T": targets[:count], "B": small[count:], "S": targets[count:]}


def weighted_ridge(label: str, rng: np.random.Generator, m: int, n: int) -> Problem:
    """``mean_i s(x_i) (a_i^T y - t_i)^2 / 2 + |y|^2 / 20``: a weight for each sample."""

    def inner(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean(sigmoid(xp, x) * (d.A @ y - d.t) ** 2) / 2 + xp.sum(y * y) / 20

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return d.A.T @ (sigmoid(xp, x) * (d.A @ y - d.t)) / m + y / 10

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean((d.B @ y - d.s) ** 2) / 2 + xp.sum(x * x) / 200

    return Problem("data weights", label, "argmin", inner, outer, F, _sets(rng, m, n),
                   np.zeros(n), rng.normal(size=m))  # fmt: skip


def kernel_ridge(label: str, rng: np.random.Generator, m: int) -> Problem:
    """``a^T (K + e^{x_0} I) a / 2 - t^T a`` with ``K = exp(-|.|^2 e^{-2 x_1} / 2)``."""
    points, others = rng.uniform(-2, 2, (m, 2)), rng.uniform(-2, 2, (m // 2, 2))
    squares = ((points[:, None] - points) ** 2).sum(-1)
    across = ((others[:, None] - points) ** 2).sum(-1)
    data = {
        "D": squares, "E": across, "I": np.eye(m),
        "t": np.sin(points).sum(1) + 0.1 * rng.normal(size=m),
        "s": np.sin(others).sum(1) + 0.1 * rng.normal(size=m // 2),
    }  # fmt: skip

    def kernel(xp: Any, D: Any, x: Any) -> Any:
        return xp.exp(-D * xp.exp(-2 * x[1]) / 2)

    def image(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return kernel(xp, d.D, x) @ y + xp.exp(x[0]) * y

    return Problem(
        "kernel ridge", label, "argmin",
        lambda xp, y, x, d: xp.sum(y * image(xp, y, x, d)) / 2 - xp.sum(d.t * y),
        lambda xp, y, x, d: xp.mean((kernel(xp, d.E, x) @ y - d.s) ** 2) + xp.sum(x * x) / 20,
        lambda xp, y, x, d: image(xp, y, x, d) - d.t,
        data, np.zeros(m), np.array([-1.5, 0.2]),
    )  # fmt: skip


def quadratic(
    label: str,
    rng: np.random.Generator,
    values: np.ndarray,
    p: int,
    family: str = "quadratic",
    curved: float = 0.0,
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Problem:
    """``y^T H y / 2 + y^T C x + c^T y`` with H of a given spectrum, all terms in the outer loss.

    The quadratic problem of benchmark_bilevel; `curved` adds ``sum_j log cosh (W y)_j`` times it to
    the inner loss. `scales` multiply the inner loss, the outer loss, and the unit of y.
    """
    n = len(values)
    data = {
        "H": spectrum(rng, values), "C": rng.normal(size=(n, p)) / p**0.5, "c": rng.normal(size=n),
        "G": spectrum(rng, np.linspace(0.5, 2, n)), "E": rng.normal(size=(n, p)) / p**0.5,
        "e": rng.normal(size=n), "P": spectrum(rng, np.linspace(0.5, 2, p)),
        "W": rng.normal(size=(n, n)) / n**0.5,
    }  # fmt: skip
    si, so, unit = scales

    def inner(xp: Any, y: Any, x: Any, d: Any) -> Any:
        u = y / unit
        value = xp.sum(u * (d.H @ u)) / 2 + xp.sum(u * (d.C @ x + d.c))
        if curved:
            value = value + curved * xp.sum(log_cosh(xp, d.W @ u))
        return si * value

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        u = y / unit
        slope = d.H @ u + d.C @ x + d.c
        if curved:
            slope = slope + curved * (d.W.T @ xp.tanh(d.W @ u))
        return si * slope / unit

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        u = y / unit
        return so * (
            xp.sum(u * (d.G @ u)) / 2 + xp.sum(u * (d.E @ x + d.e)) + xp.sum(x * (d.P @ x)) / 2
        )

    return Problem(family, label, "argmin", inner, outer, F, data, np.zeros(n), rng.normal(size=p),
                   minimum=bool((values > 0).all()))  # fmt: skip


# --- roots, fixed points, least squares -----------------------------------------------------------


def bratu(label: str, rng: np.random.Generator, n: int) -> Problem:
    """Bratu's equation ``-y'' = e^{x_0} e^y + source``, y = 0 at both ends, by differences."""
    h = 1 / (n + 1)
    L = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) / h**2
    grid = np.arange(1, n + 1) * h
    data = {"L": L, "grid": grid, "target": np.sin(np.pi * grid)}

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return d.L @ y - xp.exp(x[0] + y) - x[1] * d.grid - x[2] * d.grid**2

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean((y - d.target) ** 2) + xp.sum(x * x) / 50

    return Problem("nonlinear root", label, "root", F, outer, F, data, np.zeros(n),
                   rng.normal(size=3) / 3)  # fmt: skip


def midpoint(label: str, rng: np.random.Generator, n: int) -> Problem:
    """A step of the implicit midpoint rule for ``y' = -x_0 L y^3 + W y + x_{2:}``, from data."""
    L = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    data = {"L": L, "W": rng.normal(size=(n, n)) / n**0.5, "old": rng.normal(size=n),
            "target": rng.normal(size=n)}  # fmt: skip

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        u = (y + d.old) / 2
        return y - d.old - 0.1 * (d.W @ u - xp.exp(x[0]) * (d.L @ u**3) + x[1:])

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum((y - d.target) ** 2) / 2 + xp.sum(x * x) / 10

    return Problem("nonlinear root", label, "root", F, outer, F, data, data["old"],
                   rng.normal(size=n + 1) / 2)  # fmt: skip


def equilibrium(label: str, rng: np.random.Generator, n: int, gain: float) -> Problem:
    """``y = tanh(e^{x_0} W y + U x_{1:})`` with ``|W| = gain``: a deep equilibrium model."""
    W = rng.normal(size=(n, n))
    data = {"W": gain * W / np.linalg.norm(W, 2), "U": rng.normal(size=(n, 3)) / 2,
            "target": rng.normal(size=n)}  # fmt: skip

    def T(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.tanh(xp.exp(x[0]) * (d.W @ y) + d.U @ x[1:])

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum((y - d.target) ** 2) / 2 + xp.sum(x * x) / 10

    x = np.concatenate([[0.0], rng.normal(size=3)])

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return y - T(xp, y, x, d)

    return Problem("deep equilibrium", label, "fixed point", T, outer, F, data, np.zeros(n), x,
                   steps=500)  # fmt: skip


def exponentials(label: str, rng: np.random.Generator, m: int) -> Problem:
    """``y_0 exp(-y_1 t)`` fitted to ``data + x_0 t``, shrunk by ``e^{x_1}``: residuals."""
    t = np.linspace(0, 1, m)
    data = {"t": t, "b": 2 * np.exp(-3 * t) + 0.3 * rng.normal(size=m)}

    def residuals(xp: Any, y: Any, x: Any, d: Any) -> Any:
        fit = y[0] * xp.exp(-y[1] * d.t) - d.b - x[0] * d.t
        return xp.concatenate([fit, xp.exp(x[1]) * (y - 1)])

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        e = xp.exp(-y[1] * d.t)
        r = y[0] * e - d.b - x[0] * d.t
        slopes = [xp.sum(e * r), xp.sum(-y[0] * d.t * e * r)]
        return xp.stack(slopes) + xp.exp(2 * x[1]) * (y - 1)

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum((y - 2) ** 2) / 2 + xp.sum(xp.cos(x))

    return Problem("nonlinear least squares", label, "least squares", residuals, outer, F, data,
                   np.array([1.5, 2.0]), np.array([0.1, -2.0]))  # fmt: skip


def network(label: str, rng: np.random.Generator, m: int, n: int) -> Problem:
    """``tanh(A y) - t`` and a penalty ``e^{x_j / 2} y_j`` a weight: residuals."""
    A = rng.normal(size=(m, n))
    data = {"A": A, "t": np.tanh(A @ rng.normal(size=n)) + 0.3 * rng.normal(size=m)}

    def residuals(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.concatenate([xp.tanh(d.A @ y) - d.t, xp.exp(x / 2) * y])

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        z = xp.tanh(d.A @ y)
        return d.A.T @ ((1 - z * z) * (z - d.t)) + xp.exp(x) * y

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum(xp.sin(y)) + xp.sum(x * x) / 10

    return Problem("nonlinear least squares", label, "least squares", residuals, outer, F, data,
                   np.zeros(n), rng.normal(size=n) / 2 + 1)  # fmt: skip


# --- penalties and constraints --------------------------------------------------------------------


def _soft(xp: Any, v: Any, w: Any) -> Any:
    zero = xp.zeros_like(v)
    return xp.where(v.real > w.real, v - w, xp.where(v.real < -w.real, v + w, zero))


def penalised(family: str, label: str, rng: np.random.Generator, m: int, n: int) -> Problem:
    """``mean (A y - t - x_{-1} u)^2 / 2`` plus a nonsmooth penalty with weights ``e^x``."""
    data = {**_sets(rng, m, n), "u": rng.normal(size=m)}
    data["s"] = data["s"] - 0.5
    step = 1 / np.linalg.norm(data["A"], 2) ** 2 * m
    groups = n // 3

    def proximal(xp: Any, v: Any, x: Any) -> Any:
        if family == "lasso":
            return _soft(xp, v, step * xp.exp(x[0]))
        if family == "elastic net":
            return _soft(xp, v, step * xp.exp(x[0])) / (1 + 2 * step * xp.exp(x[1]))
        V = v.reshape(groups, 3)
        norms = xp.sqrt(xp.sum(V * V, -1))
        factor = 1 - step * xp.exp(x[0]) / norms
        factor = xp.where(factor.real > 0, factor, xp.zeros_like(factor))
        return (factor[:, None] * V).reshape(-1)

    def inner(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean((d.A @ y - d.t - x[-1] * d.u) ** 2) / 2

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        slope = d.A.T @ (d.A @ y - d.t - x[-1] * d.u) / m
        return y - proximal(xp, y - step * slope, x)

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.mean((d.B @ y - d.s) ** 2) / 2 + xp.sum(x * x) / 20

    indices = [list(range(3 * g, 3 * g + 3)) for g in range(groups)]
    made: dict[str, Callable[[], Any]] = {
        "lasso": lambda: hl.L1(lambda x: torch.exp(x[0])),
        "elastic net": lambda: hl.ElasticNet(lambda x: torch.exp(x[0]), lambda x: torch.exp(x[1])),
        "group lasso": lambda: hl.GroupLasso(lambda x: torch.exp(x[0]), indices),
    }
    x = np.array([-1.0, 0.3]) if family != "elastic net" else np.array([-1.0, -2.0, 0.3])
    return Problem(family, label, "proximal", inner, outer, F, data, np.zeros(n), x, steps=20000,
                   options=lambda d: {"penalty": made[family]()})  # fmt: skip


def constrained(which: str, label: str, rng: np.random.Generator, n: int) -> Problem:
    """``y^T H y / 2 - (C x)^T y`` over a set: a box, a ball, a simplex."""
    p = 3
    data = {"H": spectrum(rng, np.linspace(1, 5, n)), "C": 3 * rng.normal(size=(n, p)),
            "target": rng.normal(size=n)}  # fmt: skip

    def project(xp: Any, v: Any, x: Any) -> Any:
        if which == "box":
            lower, upper = -0.3 + 0 * v, 0.2 * xp.exp(x[0]) + 0 * v
            clipped = xp.where(v.real > upper.real, upper, v)
            return xp.where(v.real < lower.real, lower, clipped)
        if which == "ball":
            norm = xp.sqrt(xp.sum(v * v))
            return v * xp.exp(x[0]) / norm if norm.real > xp.exp(x[0]).real else v
        descending = v[np.argsort(-v.real)]
        thresholds = [(descending[:k].sum() - 1) / k for k in range(1, n + 1)]
        tau = max(thresholds, key=lambda each: each.real)
        return xp.where(v.real > tau.real, v - tau, xp.zeros_like(v))

    def inner(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum(y * (d.H @ y)) / 2 - xp.sum(y * (d.C @ x))

    def F(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return y - project(xp, y - 0.2 * (d.H @ y - d.C @ x), x)

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum((y - d.target) ** 2) / 2 + xp.sum(x * x) / 10

    sets: dict[str, Callable[[], Any]] = {
        "box": lambda: hl.Box(-0.3, lambda x: 0.2 * torch.exp(x[0])),
        "ball": lambda: hl.Ball(lambda x: torch.exp(x[0])),
        "simplex": lambda: hl.Simplex(),
    }
    x = np.concatenate([[0.1], rng.normal(size=p - 1)])
    return Problem(which, label, "proximal", inner, outer, F, data, np.full(n, 1 / n), x,
                   steps=2000, options=lambda d: {"constraint": sets[which]()})  # fmt: skip


def programme(which: str, label: str, rng: np.random.Generator, n: int) -> Problem:
    """``y^T H y / 2 - (C x)^T y`` with ``E y = x_0 e`` (equality), ``G y <= g`` (inequality)."""
    p, equal, unequal = 3, 2 * ("in" not in which), 4 * (which != "equality")
    data = {
        "H": spectrum(rng, np.linspace(1, 5, n)), "C": 2 * rng.normal(size=(n, p)),
        "E": rng.normal(size=(2, n)), "e": rng.normal(size=2),
        "G": rng.normal(size=(4, n)), "g": rng.uniform(0.1, 0.6, 4), "target": rng.normal(size=n),
    }  # fmt: skip

    def equality(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return d.E @ y - x[0] * d.e

    def inequality(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return d.G @ y - d.g * xp.exp(x[1])

    def inner(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum(y * (d.H @ y)) / 2 - xp.sum(y * (d.C @ x))

    def F(xp: Any, z: Any, x: Any, d: Any) -> Any:
        y, nu, lam = z[:n], z[n : n + equal], z[n + equal :]
        slope, rows = d.H @ y - d.C @ x, []
        if equal:
            slope = slope + d.E.T @ nu
            rows.append(equality(xp, y, x, d))
        if unequal:
            slope, b = slope + d.G.T @ lam, -inequality(xp, y, x, d)
            rows.append(xp.sqrt(lam * lam + b * b) - lam - b)
        return xp.concatenate([slope, *rows])

    def options(d: SimpleNamespace) -> dict[str, Any]:
        named = {}
        if equal:
            named["equality"] = lambda y, x: equality(torch, y, x, d)
        if unequal:
            named["inequality"] = lambda y, x: inequality(torch, y, x, d)
        return named

    def outer(xp: Any, y: Any, x: Any, d: Any) -> Any:
        return xp.sum((y - d.target) ** 2) / 2 + xp.sum(x * x) / 10

    extra = np.concatenate([np.zeros(equal), np.ones(unequal)])
    return Problem(which, label, "kkt", inner, outer, F, data, np.zeros(n), rng.normal(size=p),
                   extra=extra, options=options)  # fmt: skip


def zoo(seed: int = 0) -> Iterator[Problem]:
    """Every problem, in float64, and many once more in float32."""
    doubles = list(_doubles(seed))
    yield from doubles
    for problem in doubles:
        # Beyond 1e7 a condition number means nothing in float32.
        if problem.label.endswith("a") and problem.family != "ill-conditioned 1e8":
            yield problem.single()


def _doubles(seed: int) -> Iterator[Problem]:
    rng = np.random.default_rng(seed)
    for sizes, letter in (((20, 5), "a"), ((60, 20), "b"), ((15, 25), "c")):
        label = f"{sizes[0]} x {sizes[1]} {letter}"
        yield regression("ridge", f"scalar, {label}", rng, *sizes, scalar=True)
        for family in LOSSES:
            if family != "Poisson" or letter != "c":
                yield regression(family, label, rng, *sizes)
        yield weighted_ridge(label, rng, *sizes)
    for sizes, letter in (((30, 5, 3), "a"), ((40, 8, 4), "b")):
        label = f"{sizes[0]} x {sizes[1]} x {sizes[2]} {letter}"
        yield softmax(label, _classes(rng, *sizes), sizes[2], weights=False)
        yield softmax(label, _classes(rng, *sizes), sizes[2], weights=True)
    digits = mnist()
    if digits is not None:
        yield softmax("MNIST", digits, 3, weights=True)
    for m, letter in ((12, "a"), (30, "b")):
        yield kernel_ridge(f"{m} {letter}", rng, m)
    for n, p, letter in ((5, 3, "a"), (10, 10, "b"), (30, 8, "c")):
        yield quadratic(f"{n} x {p} {letter}", rng, np.linspace(0.1, 1, n), p)
        yield quadratic(f"curved, {n} x {p} {letter}", rng, np.linspace(0.1, 1, n), p, curved=1.0)
    for n, letter in ((8, "a"), (30, "b")):
        yield bratu(f"Bratu, {n} {letter}", rng, n)
        yield midpoint(f"implicit midpoint, {n} {letter}", rng, n)
    for n, gain, letter in ((6, 0.5, "a"), (20, 0.9, "b"), (12, 0.98, "c")):
        yield equilibrium(f"{n}, gain {gain} {letter}", rng, n, gain)
    for m, letter in ((12, "a"), (40, "b")):
        yield exponentials(f"exponential, {m} {letter}", rng, m)
        yield network(f"tanh, {m} x 5 {letter}", rng, m, 5)
    for m, n, letter in ((30, 9, "a"), (60, 24, "b")):
        for family in ("lasso", "elastic net", "group lasso"):
            yield penalised(family, f"{m} x {n} {letter}", rng, m, n)
        for which in ("box", "ball", "simplex"):
            yield constrained(which, f"{n} {letter}", rng, n)
        for which in ("equality", "inequality", "both"):
            yield programme(which, f"{n} {letter}", rng, n)
    for exponent, letter in ((4, "a"), (6, "a"), (8, "a"), (10, "b")):
        values = np.logspace(0, -exponent, 12)
        for curved in (0.0, 10.0**-exponent):
            label = f"{'curved, ' if curved else ''}12 x 4 {letter}"
            yield quadratic(label, rng, values, 4, f"ill-conditioned 1e{exponent}", curved)
    for negative in (1, 3):
        signs = np.where(np.arange(8) < negative, -1.0, 1.0)
        yield quadratic(f"{negative} negative a", rng, signs * np.linspace(0.5, 2, 8), 4, "saddle")
    slight = np.array([-1e-6, *np.linspace(0.5, 2, 7)])
    yield quadratic("slightly negative", rng, slight, 4, "saddle")
    for exponent in (12, 14):
        values = np.logspace(0, -exponent, 10)
        yield quadratic(f"1e{exponent}", rng, values, 4, "near-singular")
