"""scikit-learn solves, we differentiate: `hl.implicit` around solvers that torch knows nothing of.

References are central differences of scikit-learn's own solutions and, where there is one, the
closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn import linear_model, svm
from torch import Tensor

import hyperlearn as hl


def data(n: int = 40, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features, and targets of which half the features are useless."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    truth = np.where(np.arange(d) < d // 2, 2.0, 0.0)
    return torch.tensor(X), torch.tensor(X @ truth + rng.standard_normal(n))


def central(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    """Jacobian by central differences, ``(dim f, dim x)``."""
    units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    return torch.stack([(f(x + h * u) - f(x - h * u)) / (2 * h) for u in units], -1)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    """Relative 2-norm."""
    assert float((actual - expected).norm()) <= rtol * float(expected.norm())


X, t = data()
labels = torch.where(t > 0, 1.0, -1.0).double()


def soft(v: Tensor, threshold: Tensor) -> Tensor:
    """Proximal map of the 1-norm."""
    return torch.sign(v) * (v.abs() - threshold).clamp_min(0)


@hl.implicit(loss=lambda w, a: (X @ w - t).square().sum() + a * w.square().sum())
def ridge(a: Tensor) -> Tensor:
    model = linear_model.Ridge(alpha=float(a), fit_intercept=False, solver="cholesky")
    return torch.tensor(model.fit(X.numpy(), t.numpy()).coef_)


@hl.implicit(
    fixed_point=lambda w, a: soft(w - X.mT @ (X @ w - t) / len(t) / 4, a / 4),
    rtol=1e-7,
)
def lasso(a: Tensor) -> Tensor:
    model = linear_model.Lasso(alpha=float(a), fit_intercept=False, tol=1e-14, max_iter=100_000)
    return torch.tensor(model.fit(X.numpy(), t.numpy()).coef_)


def elastic_step(w: Tensor, a: Tensor, share: Tensor) -> Tensor:
    """One step of proximal gradient descent of the elastic net in scikit-learn's parameters."""
    gradient = X.mT @ (X @ w - t) / len(t) + a * (1 - share) * w
    return soft(w - gradient / 4, a * share / 4)


@hl.implicit(fixed_point=elastic_step, rtol=1e-7)
def elastic_net(a: Tensor, share: Tensor) -> Tensor:
    model = linear_model.ElasticNet(
        alpha=float(a), l1_ratio=float(share), fit_intercept=False, tol=1e-14, max_iter=100_000
    )
    return torch.tensor(model.fit(X.numpy(), t.numpy()).coef_)


@hl.implicit(
    loss=lambda w, C: (
        w.square().sum() / 2 + C * torch.nn.functional.softplus(-labels * (X @ w)).sum()
    ),
    rtol=1e-7,
)
def logistic(C: Tensor) -> Tensor:
    model = linear_model.LogisticRegression(
        C=float(C), fit_intercept=False, tol=1e-12, solver="newton-cholesky", max_iter=1000
    )
    return torch.tensor(model.fit(X.numpy(), labels.numpy()).coef_[0])


@hl.implicit(
    loss=lambda w, C: w.square().sum() / 2 + C * (1 - labels * (X @ w)).clamp_min(0).square().sum(),
    rtol=1e-6,
)
def squared_hinge(C: Tensor) -> Tensor:
    model = svm.LinearSVC(
        C=float(C), fit_intercept=False, dual=False, tol=1e-12, max_iter=100_000, random_state=0
    )
    return torch.tensor(model.fit(X.numpy(), labels.numpy()).coef_[0])


def support_vectors(point: tuple[Tensor, Tensor], C: Tensor) -> tuple[Tensor, Tensor]:
    """Optimality of the dual: ``a = clip(a - (Q a - 1 + b t), 0, C)`` and ``t.a = 0``."""
    a, b = point
    Z = labels[:, None] * X
    gradient = Z @ (Z.mT @ a) - 1 + labels * b
    moved = a - gradient / 100
    return a - torch.minimum(moved.clamp_min(0), C), labels @ a


@hl.implicit(residual=support_vectors, rtol=1e-6)
def machine(C: Tensor) -> tuple[Tensor, Tensor]:
    model = svm.SVC(C=float(C), kernel="linear", tol=1e-12).fit(X.numpy(), labels.numpy())
    a = np.zeros(len(t))
    a[model.support_] = np.abs(model.dual_coef_[0])
    return torch.tensor(a), torch.tensor(model.intercept_[0])


class TestAgainstDifferences:
    @pytest.mark.parametrize("a", [0.1, 3.0, 100.0])
    def test_ridge(self, a):
        a = torch.tensor(a).double()
        H = X.mT @ X + a * torch.eye(X.shape[1])
        exact = -torch.linalg.solve(H, torch.linalg.solve(H, X.mT @ t))
        close(torch.func.jacrev(ridge)(a), exact, 1e-10)
        close(torch.func.jacfwd(ridge)(a), exact, 1e-10)
        second = torch.func.jacfwd(torch.func.jacrev(ridge))(a)
        close(second, -2 * torch.linalg.solve(H, exact), 1e-9)

    @pytest.mark.parametrize("a", [0.02, 0.2, 1.0])
    def test_lasso(self, a):
        a = torch.tensor(a).double()
        w = lasso(a)
        active = w != 0
        assert 0 < int(active.sum()) <= len(w)
        gradient = torch.func.jacrev(lasso)(a)
        close(gradient, central(lasso, a)[:, 0])
        A = X[:, active]
        exact = -len(t) * torch.linalg.solve(A.mT @ A, w[active].sign())
        close(gradient[active], exact, 1e-8)
        assert bool((gradient[~active] == 0).all())
        close(torch.func.jacfwd(lasso)(a), gradient, 1e-10)

    def test_lasso_agrees_with_our_own(self):
        a = torch.tensor(0.2).double()

        def ours(a: Tensor) -> Tensor:
            return hl.argmin(
                lambda w, a: (X @ w - t).square().mean() / 2,
                torch.zeros(X.shape[1]).double(),
                a,
                penalty=hl.L1(lambda a: a),
            )

        close(ours(a), lasso(a).detach(), 1e-8)
        close(torch.func.jacrev(ours)(a), torch.func.jacrev(lasso)(a), 1e-8)

    @pytest.mark.parametrize("argnum", [0, 1])
    def test_elastic_net(self, argnum):
        point = (torch.tensor(0.3).double(), torch.tensor(0.6).double())

        def alone(z: Tensor) -> Tensor:
            return elastic_net(*(z if i == argnum else p for i, p in enumerate(point)))

        gradient = torch.func.jacrev(elastic_net, argnums=argnum)(*point)
        close(gradient, central(alone, point[argnum])[:, 0])

    @pytest.mark.parametrize("C", [0.01, 1.0, 10.0])
    def test_logistic(self, C):
        C = torch.tensor(C).double()
        # In the tolerance of the solver: differences of its solutions are no better.
        close(torch.func.jacrev(logistic)(C), central(logistic, C, 1e-4 * float(C))[:, 0])

    def test_squared_hinge(self):
        C = torch.tensor(0.05).double()
        close(torch.func.jacrev(squared_hinge)(C), central(squared_hinge, C, 1e-4)[:, 0], 1e-5)

    def test_support_vector_machine(self):
        C = torch.tensor(0.3).double()
        a, _ = machine(C)
        assert bool(((a > 0) & (a < C)).any())
        assert bool((a == C).any())
        through_a, through_b = torch.func.jacrev(machine)(C)

        def joined(C: Tensor) -> Tensor:
            a, b = machine(C)
            return torch.cat([a, b[None]])

        close(torch.cat([through_a, through_b[None]]), central(joined, C)[:, 0], 1e-5)


class TestOuterLoss:
    @pytest.mark.parametrize("solver", [ridge, lasso, logistic])
    def test_hyperparameter_of_a_validation_loss(self, solver):
        V, s = data(seed=1)

        def outer(a: Tensor) -> Tensor:
            return (V @ solver(a) - s).square().mean() + 0.1 * a.square()

        a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        outer(a).backward()
        close(a.grad.reshape(1), central(lambda a: outer(a).reshape(1), a.detach())[0])

    def test_batch_of_hyperparameters(self):
        several = torch.tensor([0.1, 0.4, 2.0]).double()
        alone = torch.stack([torch.func.jacrev(ridge)(a) for a in several])
        close(torch.func.vmap(torch.func.jacrev(ridge))(several), alone, 1e-12)

    def test_sloppy_solver_is_flagged(self):
        @hl.implicit(loss=lambda w, a: (X @ w - t).square().sum() + a * w.square().sum())
        def sloppy(a: Tensor) -> Tensor:
            model = linear_model.Ridge(
                alpha=float(a), fit_intercept=False, solver="lsqr", tol=0.1, max_iter=1
            )
            return torch.tensor(model.fit(X.numpy(), t.numpy()).coef_)

        with pytest.warns(hl.solvers.ConvergenceWarning, match="sloppy returned y with"):
            sloppy(torch.tensor(1.0).double())
