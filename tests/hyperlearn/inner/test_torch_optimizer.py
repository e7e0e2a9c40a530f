"""Optimisers of torch.optim against the same loop written out."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import solvers
from hyperlearn.inner import TorchOptimizer
from hyperlearn.solutions import argmin
from tests.hyperlearn.problems import FLOAT64, sampled, spd

H, BY = spd(4, 5.0), sampled(4, seed=1)
ZERO = torch.zeros(4, dtype=FLOAT64)


def loss(y: Tensor, x: Tensor) -> Tensor:
    return y @ H @ y / 2 - x @ y + torch.cosh(y).sum()


OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.5),
    "adam": partial(torch.optim.Adam, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "rprop": torch.optim.Rprop,
    "lbfgs": torch.optim.LBFGS,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_optimiser(name: str) -> None:
    method = TorchOptimizer(optimizer=OPTIMIZERS[name], maxiter=3, rtol=0.0)
    x = BY.clone().requires_grad_()  # must not leak into the optimiser
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        y = argmin(loss, ZERO, x, method=method)
    p = torch.nn.Parameter(ZERO.clone())
    optimizer = OPTIMIZERS[name]([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(p, BY)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(y.detach(), p.detach(), rtol=1e-12, atol=1e-14)


def test_a_schedule_goes_along_and_the_start_is_left_alone() -> None:
    method = TorchOptimizer(
        optimizer=partial(torch.optim.SGD, lr=0.2),
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        maxiter=3,
        rtol=0.0,
    )
    start = ZERO.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        y = argmin(loss, start, BY, method=method)
    by_hand = ZERO
    for k in range(3):
        by_hand = by_hand - 0.2 * 0.5**k * (H @ by_hand - BY + torch.sinh(by_hand))
    torch.testing.assert_close(y, by_hand, rtol=1e-13, atol=1e-14)
    assert torch.equal(start, ZERO)


def test_its_solution_is_differentiated_like_any_other() -> None:
    method = TorchOptimizer(optimizer=partial(torch.optim.SGD, lr=0.1), rtol=1e-10)
    X = torch.stack([BY, -2 * BY])
    f = lambda x: argmin(loss, ZERO, x, method=method)  # noqa: E731
    reference = lambda x: argmin(loss, ZERO, x)  # noqa: E731
    torch.testing.assert_close(jacrev(f)(BY), jacrev(reference)(BY), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(vmap(f)(X), vmap(reference)(X), rtol=1e-8, atol=1e-9)


def test_settings() -> None:
    with pytest.raises(ValueError, match="TorchOptimizer: optimizer="):
        TorchOptimizer(optimizer="adam")  # type: ignore[arg-type]
