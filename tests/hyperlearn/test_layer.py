"""`ImplicitLayer`: gradients by parameters and inputs against long unrolling and differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hyperlearn as hl


class Cell(nn.Module):
    def __init__(self, width: int = 5, inputs: int = 3) -> None:
        super().__init__()
        self.state, self.input = nn.Linear(width, width), nn.Linear(inputs, width)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.4 * self.state(z) + self.input(u))


def start(u: Tensor) -> Tensor:
    return u.new_zeros(len(u), 5)


@pytest.fixture
def cell() -> Cell:
    torch.manual_seed(0)
    return Cell().double()


@pytest.fixture
def u() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def long_unrolling(cell: Cell, u: Tensor) -> Tensor:
    z = start(u)
    for _ in range(300):
        z = cell(z, u)
    return z


@pytest.mark.parametrize("by_sample", [True, False])
def test_value_and_gradients_are_those_of_a_long_unrolling(cell, u, by_sample):
    layer = hl.ImplicitLayer(cell, initial=start, by_sample=by_sample)
    u = u.requires_grad_()
    weights = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)
    leaves = [u, *cell.parameters()]
    ours = torch.autograd.grad((weights * layer(u)).sum(), leaves)
    expected = torch.autograd.grad((weights * long_unrolling(cell, u)).sum(), leaves)
    for found, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-7, atol=1e-9)
    assert layer.info.converged
    assert layer.info.adjoint
    assert all(info.converged for info in layer.info.adjoint)


@pytest.mark.parametrize("mode", ["unrolled", "one_step", "identity", "truncated(5)"])
def test_other_modes(cell, u, mode):
    method = hl.inner.FixedPointIteration()
    layer = hl.ImplicitLayer(cell, initial=start, differentiate=mode, method=method)
    exact = hl.ImplicitLayer(cell, initial=start)

    def gradient(layer: hl.ImplicitLayer) -> Tensor:
        return torch.func.grad(lambda u: layer(u).square().sum())(u)

    error = (gradient(layer) - gradient(exact)).norm() / gradient(exact).norm()
    assert error < (1e-8 if mode == "unrolled" else 0.5)
    assert mode == "unrolled" or error > 1e-6


def test_functional_call_under_transforms(cell, u):
    layer = hl.ImplicitLayer(cell, initial=start)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (u,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    loss_of_weight = lambda w: loss({**parameters, "module.state.bias": w})  # noqa: E731
    bias = parameters["module.state.bias"]
    h = 1e-6
    units = torch.eye(len(bias)).double()
    central = torch.stack(
        [(loss_of_weight(bias + h * e) - loss_of_weight(bias - h * e)) / (2 * h) for e in units]
    )
    torch.testing.assert_close(found["module.state.bias"], central, rtol=1e-6, atol=1e-8)


def test_root_and_argmin_layers(u):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return self.scale * z + z**3 - u

    class Energy(Residual):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return (self.scale * z**2 / 2 + z**4 / 4 - u * z).sum()

    root, minimum = (
        hl.ImplicitLayer(module, kind=kind, initial=torch.zeros_like)
        for module, kind in ((Residual(), "root"), (Energy(), "argmin"))
    )
    torch.testing.assert_close(root(u), minimum(u))
    gradients = []
    for layer in (root, minimum):
        layer(u).sum().backward()
        gradients.append(layer.module.scale.grad)
    z = root(u).detach()
    torch.testing.assert_close(gradients[0], -(z / (2 + 3 * z**2)).sum())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_warm_start_and_trains(cell, u):
    layer = hl.ImplicitLayer(cell, initial=start)
    z = layer(u).detach()
    layer(u, z0=z)
    assert layer.info.iterations == 0
    model = nn.Sequential(layer, nn.Linear(5, 1).double())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    target = torch.tensor([[1.0], [-1.0], [0.5], [0.0]]).double()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(u) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20


def test_errors(cell, u):
    with pytest.raises(ValueError, match="kind='solve'"):
        hl.ImplicitLayer(cell, kind="solve")
    with pytest.raises(TypeError, match="expected a torch"):
        hl.ImplicitLayer(lambda z: z)
    with pytest.raises(ValueError, match="initial= or z0="):
        hl.ImplicitLayer(cell)()
    with pytest.raises(ValueError, match="one number of samples"):
        hl.ImplicitLayer(cell, initial=lambda u: u.new_zeros(3, 5))(u)
    narrow = hl.ImplicitLayer(nn.Bilinear(3, 3, 2).double())  # z like u, mapped to another shape
    with pytest.raises(ValueError, match="expected the structure of y0"):
        narrow(u)
