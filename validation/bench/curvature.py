"""Curvature operators against hand-written torch and against curvlinops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp

import operators as ops
from validation.bench.timing import Bench

Parameters = dict[str, Tensor]


def million() -> tuple[torch.nn.Module, Parameters, Tensor, Tensor]:
    """An MLP of 992,960 parameters and a batch of 256, seeded."""
    torch.manual_seed(0)
    sizes = (784, 800, 450, 10)
    layers: list[torch.nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(i, o), torch.nn.Tanh()]
    net = torch.nn.Sequential(*layers[:-1])
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    return net, parameters, torch.randn(256, 784), torch.randint(0, 10, (256,))


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

    expected = jvp(grad(loss), (y,), (v,))[1]
    for ours in (hessian @ v, forward @ v):
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6)
    rivals: dict[str, Callable[[], object]] = {
        "Hessian": lambda: hessian @ v,
        "Hessian, mode='forward'": lambda: forward @ v,
        "double backward": double_backward,
        "double backward, graph kept": double_backward_kept,
        "jvp(grad(loss))": lambda: jvp(grad(loss), (y,), (v,))[1],
        "vjp(grad(loss))": lambda: vjp(grad(loss), y)[1](v)[0],
        "one gradient": lambda: grad(loss)(y),
    }
    weights = sum(p.numel() for p in y.values())
    # The graph that is kept spares the forward and the first backward sweep: what is left is two
    # matrix products a layer and sample for each of the two sweeps that it goes back through.
    flops = 8 * weights * len(inputs)
    bench.compare(
        "Hessian product, MLP of 992,960 parameters, batch 256, float32",
        rivals,
        lambda medians: (
            f"{flops / 1e9:.1f} Gflop in matrix products: "
            f"{flops / 1e9 / medians['Hessian']:.0f} Gflop/s"
        ),
    )
