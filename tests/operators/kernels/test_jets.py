"""Jets against ``torch.func.jacrev`` and ``hessian``, rule by rule and through networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from operators.kernels.jets import Field, Jet, jets
from tests.operators.kernels.families import close, float64, net, normal, random


def by_func(f, x):
    """Row by row."""

    def row(z):
        return f(z[None])[0]

    first = torch.func.vmap(torch.func.jacrev(row))(x)
    second = torch.func.vmap(torch.func.hessian(row))(x)
    return f(x), first, second


def check(f, x, rtol=1e-12):
    value, first, second = by_func(f, x)
    close(jets(f, x, 0)[0], value, 1e-15)
    assert jets(f, x, 0)[1:] == (None, None)
    found = jets(f, x, 1)
    close(found[0], value, 1e-14)
    torch.testing.assert_close(found[1], first, rtol=rtol, atol=rtol)
    assert found[2] is None
    found = jets(f, x, 2)
    close(found[0], value, 1e-14)
    torch.testing.assert_close(found[1], first, rtol=rtol, atol=rtol)
    torch.testing.assert_close(found[2], second, rtol=rtol, atol=rtol)


W, B, C = normal(3, 2, seed=1), normal(3, seed=2), normal(2, seed=3)
RULED = {
    "linear": lambda x: F.linear(x, W, B),
    "linear without bias": lambda x: F.linear(x, W),
    "softplus": lambda x: F.softplus(x),
    "softplus of beta": lambda x: F.softplus(3 * x, beta=2.0),
    "silu": F.silu,
    "F.tanh": F.tanh,
    "F.sigmoid": F.sigmoid,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "log": lambda x: torch.log(x + 1),
    "sin": torch.sin,
    "cos": torch.cos,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "neg": torch.neg,
    "pow": lambda x: torch.pow(x, 3) + x**2.5 + x**-1 + x**2 + x**0.5,
    "cat": lambda x: torch.cat([x, x.exp(), x[:, :1] * x[:, 1:]], -1),
    "cat with what is no jet": lambda x: (
        torch.cat([x.sin(), torch.ones(len(X), 1).double()], 1)
        if isinstance(x, Jet)
        else torch.cat([x.sin(), torch.ones(len(x), 1).double()], 1)
    ),
    "stack": lambda x: torch.stack([x[:, 0] * x[:, 1], x[..., 0].exp()], -1),
    "stack of rows": lambda x: torch.stack((x[:, 1], x[:, 0]), dim=1),
    "matmul": lambda x: torch.matmul(x, W.mT) + x @ W.mT + x.matmul(W.mT),
    "sum": lambda x: torch.sum(x * x, -1, keepdim=True) + x.exp().sum(1, keepdim=True),
    "sum by name": lambda x: (x * x).sum(dim=-1).unsqueeze(-1),
    "squeeze": lambda x: x.sin().unsqueeze(1).squeeze(1) + torch.unsqueeze(x, 2).squeeze(-1),
    "numbers": lambda x: (1 + x) * 2 - (3 - x) / 4 + 5 / (x + 6) - (x - 7) * (-x) + 0.5 * x,
    "tensors": lambda x: (C + x) * C - (C - x) / C + C / (x + 3) - (x - C) * (-x) + C * x,
    "functions of two": lambda x: (
        torch.add(x, x.exp(), alpha=2.0)
        + torch.sub(C, x) * torch.mul(x, C)
        + torch.div(x, x + 2)
        - torch.div(C, x + 1)
    ),
    "methods": lambda x: x.add(1).mul(x).sub(x.sin()).div(x + 1).neg().square().tanh(),
    "quotient": lambda x: x[:, :1] / (1 + x[:, 1:]) - x / (1 + x.square().sum(-1, keepdim=True)),
    "rows of a matrix": lambda x: (x[:, None, :] * W).sum(-1),
    "distances to centres": lambda x: (-((x[:, None, :] - W) ** 2).sum(-1)).exp(),
    "fields and matrices": lambda x: (
        x[:, 0].unsqueeze(-1) * W[:, 0] + x[:, 1:] + x[:, :1] * x[:, 1:]
    ),
    "constant in one": lambda x: x * 0 + 3.0,
    "expanded": lambda x: x[:, :1] + torch.zeros(4, dtype=float64),
    "expanded product": lambda x: x[:, :1] * (x @ W.mT) + x[:, 1:].exp(),
    "shape": lambda x: x[..., : x.shape[-1] - 1] * x.ndim,
}
UNRULED = {
    "erf": torch.erf,
    "where": lambda x: torch.where(x > 0.5, x.exp(), x.sin()),
    "comparison": lambda x: (x == 0.25) * x + (x != 0.25) * x**2,
    "abs": lambda x: abs(x - 0.5) ** 3,
    "power of a number": lambda x: 2**x + 1.5 ** (x * x),
    "power of a tensor": lambda x: x**C,
    "power of itself": lambda x: x**x,
    "matrix from the left": lambda x: (W @ x.mT).mT,
    "reshape": lambda x: x.reshape(x.shape[0], 2, 1).flatten(1),
    "length": lambda x: x.exp() * torch.ones(len(x), 1, dtype=float64),
    "in place": lambda x: x.sin().add_(1.0),
    "rows": lambda x: torch.stack([row.exp() for row in x]),
    "positive": lambda x: +x,
    "total": lambda x: (x**2).sum((-1,), keepdim=True),
    "axis": lambda x: torch.sum(x**2, axis=-1, keepdims=True),
    "mean": lambda x: x.exp().mean(-1, keepdim=True),
    "transposed": lambda x: x.exp().T.contiguous().T,
    "einsum": lambda x: torch.einsum("ni,oi->no", x.sin(), W),
    "constant": lambda x: torch.ones(x.shape[0], 2, dtype=float64),
    "transposed twice": lambda x: (W[:, :1] * x[:, 0] + W[:, 1:] * x[:, 1]).mT,
}
X = torch.tensor([[0.25, 0.8], [0.6, 0.1], [0.9, 0.35], [0.45, 0.7]], dtype=float64)


@pytest.mark.parametrize("name", list(RULED))
def test_rules(name):
    check(RULED[name], X)
    # By its rule, not by what functions without one fall back on.
    assert isinstance(RULED[name](Jet.at(X, 2)), Jet)


@pytest.mark.parametrize("name", list(UNRULED))
def test_without_a_rule(name):
    check(UNRULED[name], X)


@pytest.mark.parametrize("act", [nn.Tanh, nn.Softplus, nn.SiLU, nn.Sigmoid, nn.GELU, nn.Mish])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_networks(act, d):
    check(net(d, 7, 5, 2, act=act), random(4, d, seed=1))
    check(net(d, 7, 1, act=act, last=nn.Softplus()), random(4, d, seed=1))


def test_convenient_layers_have_rules():
    for act in (nn.Tanh, nn.Softplus, nn.SiLU, nn.Sigmoid):
        assert isinstance(net(2, 3, 1, act=act)(Jet.at(X, 2)), Jet)


def test_what_aligns_from_the_right_does_so_in_the_values():
    """A new axis stands after that of the derivatives, however many these are."""
    for k in (1, 3, 6):  # 1 + d and 1 + d + d (d + 1) / 2 among them
        w, z = normal(k, 1, seed=1), normal(k, 4, seed=2)

        def f(x, w=w, z=z):
            first, second = x[..., 0], x[..., 1]
            waves = (
                (w * first).sin() + (w + second).exp() * z - second / (2 + w) + first * second * w
            )
            return waves.sum(0).unsqueeze(-1)

        # Not row by row as such: but rows enter one by one.
        found = jets(f, X, 2)

        def row(x, w=w, z=z):
            waves = []
            for i in range(4):
                a, b = x[i, 0], x[i, 1]
                v = w[:, 0]
                waves.append(
                    ((v * a).sin() + (v + b).exp() * z[:, i] - b / (2 + v) + a * b * v).sum()
                )
            return torch.stack(waves)

        assert isinstance(f(Jet.at(X, 2)), Jet)
        close(found[0][:, 0], row(X), 1e-13)
        jacobian = torch.func.jacrev(row)(X)
        close(found[1][:, 0], torch.stack([jacobian[i, i] for i in range(4)]), 1e-12)
        hessian = torch.func.hessian(row)(X)
        close(found[2][:, 0], torch.stack([hessian[i, i, :, i] for i in range(4)]), 1e-12)


def test_whole_powers_at_zero():
    x = torch.zeros(1, 2, dtype=float64)
    for p in (0, 1, 2, 3, 1.0, 2.0, 3.0):
        check(lambda z, p=p: z**p, x)


def test_large_arguments():
    x = torch.tensor([[-800.0, 800.0], [-30.0, 30.0]], dtype=float64)
    for f in (torch.tanh, torch.sigmoid, F.softplus, F.silu):
        for part in jets(f, x, 2):
            assert bool(torch.isfinite(part).all())
        check(f, x, 1e-8)


def test_batches_of_points():
    x = random(3, 4, 2)
    module = net(2, 5, 3)
    for f in (module, torch.erf):
        value, first, second = jets(f, x, 2)
        assert value.shape == x.shape[:-1] + value.shape[-1:]
        for k in range(3):
            for batched, single in zip((value, first, second), jets(f, x[k], 2), strict=True):
                close(batched[k], single, 1e-14)


@pytest.mark.parametrize("f", [net(2, 5, 1, last=nn.Softplus()), torch.erf])
def test_jets_are_differentiable(f):
    """By the points, and by the parameters of a network."""
    v = [normal(4, 1, seed=1), normal(4, 1, 2, seed=2), normal(4, 1, 2, 2, seed=3)]

    def total(x):
        return sum((a * b[:, :1]).sum() for a, b in zip(v, jets(f, x, 2), strict=True))

    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(total, x)
    assert torch.autograd.gradgradcheck(total, x)


def test_parameters_of_a_network_are_differentiated():
    field = Field.of(net(2, 5, 1, last=nn.Softplus()), "length")

    def total(parameters):
        found = jets(Field(field.function, parameters), X, 2)
        return sum(((k + 1) * part).sum() for k, part in enumerate(found))

    gradient = torch.func.grad(total)(field.parameters)
    for name, tensor in field.parameters.items():
        direction = normal(*tensor.shape)
        moved = [
            total({**field.parameters, name: tensor + h * direction}).item() for h in (1e-5, -1e-5)
        ]
        slope = float((gradient[name] * direction).sum())
        assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6)


def test_single_precision_stays():
    module = net(2, 5, 1).float()
    for f in (module, torch.erf):
        assert all(part.dtype == torch.float32 for part in jets(f, X.float(), 2))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("f", [lambda x: x.sum(0), lambda x: torch.erf(x)[:2], lambda x: 3.0])
def test_functions_have_a_row_for_each_point(f, order):
    with pytest.raises(
        ValueError, match=r"a function of points \(4, 2\) returned .*; expected \(4,"
    ):
        jets(f, X, order)


def test_errors_of_the_function_are_its_own():
    def f(x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        jets(f, X, 2)
    with pytest.raises(AttributeError, match="no_such_method"):
        jets(lambda x: x.no_such_method(), X, 2)
    with pytest.raises(TypeError):
        jets(lambda x: torch.exp(x, 3), X, 2)


def test_a_jet_answers_as_a_tensor_does():
    x = Jet.at(X, 2)
    assert x.shape == X.shape
    assert x.ndim == 2
    assert x.dtype == float64
    assert x.device == X.device
    assert bool((x.value == X).all())
    for refused in (lambda: bool(x), lambda: x == X, lambda: x.cumsum(0), lambda: torch.erf(x)):
        with pytest.raises(NotImplementedError):
            refused()


# --- fields ------------------------------------------------------------------------------------


def test_fields_are_trees_of_their_parameters():
    module = net(2, 3, 1)
    field = Field.of(module, "length")
    leaves, spec = pytree.tree_flatten(field)
    assert [leaf.data_ptr() for leaf in leaves] == [p.data_ptr() for p in module.parameters()]
    doubled = pytree.tree_unflatten([2 * leaf for leaf in leaves], spec)
    h = torch.tanh(X @ (2 * leaves[0]).mT + 2 * leaves[1])
    close(doubled(X), h @ (2 * leaves[2]).mT + 2 * leaves[3], 1e-14)
    close(field(X), module(X), 1e-15)
    assert Field.of(field, "length") is field
    assert Field.of(torch.exp, "length").parameters == {}


def test_shown():
    assert repr(Field.of(net(2, 3, 1), "length")) == "Sequential of 13 parameters"
    assert repr(Field.of(torch.exp, "length")) == "exp"


def test_field_refuses():
    with pytest.raises(TypeError, match=r"length is a float; expected a function or nn.Module"):
        Field.of(1.0, "length")
