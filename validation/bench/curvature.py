"""Products with Hessians and Gauss-Newton matrices: torch by hand, and curvlinops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap

import operators as ops
from validation.bench import limits
from validation.bench.timing import Bench

Parameters = dict[str, Tensor]

SIZES = (784, 800, 450, 10)
BATCH = 256
# Multiplications and additions of one pass through the weights, and through those of the first
# layer, through which nothing needs to go back to the inputs.
PASS = 2 * BATCH * sum(i * o for i, o in itertools.pairwise(SIZES))
FIRST = 2 * BATCH * SIZES[0] * SIZES[1]
LIMIT = "one matrix product of as many flops"


def million() -> tuple[torch.nn.Module, Parameters, Tensor, Tensor]:
    """An MLP of 992,960 parameters and a batch of 256, seeded."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for i, o in itertools.pairwise(SIZES):
        layers += [torch.nn.Linear(i, o), torch.nn.Tanh()]
    net = torch.nn.Sequential(*layers[:-1])
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return net, parameters, torch.randn(BATCH, SIZES[0]), torch.randint(0, SIZES[-1], (BATCH,))


def hessian_product(bench: Bench) -> None:
    """One Hessian product at 1e6 parameters: ours, double backward, and torch.func by hand."""
    net, y, inputs, targets = million()

    def loss(y: Parameters) -> Tensor:
        return torch.nn.functional.cross_entropy(functional_call(net, y, (inputs,)), targets)

    v = {name: torch.randn_like(p) for name, p in y.items()}
    hessian, forward = ops.Hessian(loss, y), ops.Hessian(loss, y, mode="forward")
    leaves = {name: p.clone().requires_grad_() for name, p in y.items()}
    held = list(leaves.values())

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(leaves), held, create_graph=True)

    def double_backward() -> object:
        return torch.autograd.grad(gradient(), held, grad_outputs=list(v.values()))

    kept = gradient()

    def double_backward_kept() -> object:
        return torch.autograd.grad(kept, held, grad_outputs=list(v.values()), retain_graph=True)

    # With activations and their gradients at hand: V a + W a' for the tangents a' (a' = 0 before
    # the first layer), W^T d' + V^T d for those of the gradients d, and d' a^T + d a'^T.
    flops = 6 * PASS - 4 * FIRST
    bench.compare(
        "Hessian product, MLP of 992,960 parameters, batch 256, float32",
        {
            "Hessian": lambda: hessian @ v,
            "Hessian, mode='forward'": lambda: forward @ v,
            "double backward": double_backward,
            "double backward, graph kept": double_backward_kept,
            "jvp(grad(loss))": lambda: jvp(grad(loss), (y,), (v,))[1],
            "vjp(grad(loss))": lambda: vjp(grad(loss), y)[1](v)[0],
        },
        lambda medians: (
            f"Arithmetic, graph kept: at least {flops / 1e9:.1f} Gflop; Hessian takes "
            f"{medians['Hessian'] / medians[LIMIT]:.1f} times as long as one matrix product of "
            f"so many ({flops / 1e9 / medians['Hessian']:.0f} Gflop/s)."
        ),
        tolerance=1e-3,
        beside={"one gradient": lambda: grad(loss)(y), LIMIT: limits.matrix_product(flops)},
    )


def gauss_newton_product(bench: Bench) -> None:
    """Gauss-Newton products of the same network."""
    theirs = bench.optional("curvlinops")
    for columns in (1, 8):
        gauss_newton_block(bench, columns, theirs)


def gauss_newton_block(bench: Bench, columns: int, curvlinops: Any) -> None:
    """One Gauss-Newton product with a vector or a block: ours, curvlinops, by hand."""
    net, y, inputs, targets = million()
    space, point = ops.Space.of(y), ops.Space.of(y).ravel(y)
    loss = torch.nn.CrossEntropyLoss()
    v = torch.randn(space.size, columns) if columns > 1 else torch.randn(space.size)
    ours = ops.GaussNewton(net, loss, None, inputs, targets)

    def outputs(flat: Tensor) -> Tensor:
        return functional_call(net, space.unravel(flat), (inputs,))

    def column(v: Tensor) -> Tensor:
        tangent = jvp(outputs, (point,), (v,))[1]
        z, pull = vjp(outputs, point)
        p = z.softmax(1)
        return pull(p * (tangent - (p * tangent).sum(1, keepdim=True)) / BATCH)[0]

    by_hand = vmap(column, in_dims=1, out_dims=1) if columns > 1 else column
    rivals: dict[str, Callable[[], object]] = {"GaussNewton": lambda: ours @ v}
    if curvlinops:
        theirs = curvlinops.GGNLinearOperator(
            net, loss, list(net.parameters()), [(inputs, targets)], check_deterministic=False
        )
        rivals["curvlinops"] = lambda: theirs @ v
    rivals["jvp, softmax's Hessian, vjp"] = lambda: by_hand(v)
    # V a + W a' forward, d a^T and W^T d back.
    flops = columns * (4 * PASS - 2 * FIRST)
    bench.compare(
        "Gauss-Newton product, MLP of 992,960 parameters, batch 256, float32, "
        + ("a vector" if columns == 1 else f"a block of {columns}"),
        rivals,
        lambda medians: (
            f"Arithmetic, activations kept: at least {flops / 1e9:.1f} Gflop; ours takes "
            f"{medians['GaussNewton'] / medians[LIMIT]:.1f} times as long as one matrix product "
            f"of so many ({flops / 1e9 / medians['GaussNewton']:.0f} Gflop/s)."
        ),
        tolerance=1e-4,
        beside={LIMIT: limits.matrix_product(flops)},
    )
