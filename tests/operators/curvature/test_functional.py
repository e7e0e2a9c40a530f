"""`functional`: a module as a pure function of its parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from operators.curvature.fisher import Fisher
from operators.curvature.gauss_newton import GaussNewton
from operators.curvature.module import FunctionalModule, as_function, functional
from operators.derivatives import Hessian, Jacobian
from operators.space import Space

FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in double precision, with seeded parameters."""
    module = module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * sampled(*parameter.shape, seed=seed + i))
    return module


class Tied(nn.Module):
    """``W^T tanh(W x)``: the second layer goes by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def test_is_the_module_at_its_own_parameters_and_at_others():
    net = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model, y = functional(net)
    x = sampled(5, 3, seed=9)
    assert torch.equal(model(y, x), net(x).detach())
    moved = {name: value + 1 for name, value in y.items()}
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(model(moved, x), other(x).detach())


def test_parameters_share_memory_but_no_history():
    net = filled(nn.Linear(3, 2))
    _, y = functional(net)
    assert list(y) == ["weight", "bias"]
    assert not any(value.requires_grad for value in y.values())
    with torch.no_grad():
        net.bias.add_(1)
    assert torch.equal(y["bias"], net.bias.detach())


def test_the_module_is_left_as_it_was():
    net = filled(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model, y = functional(net)
    torch.func.jacrev(lambda y: model(y, sampled(5, 3)))(y)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    assert not net.training


def test_gradient_is_that_of_autograd():
    net = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    model, y = functional(net)
    x = sampled(5, 3, seed=9)
    expected = torch.autograd.grad(net(x).square().mean(), tuple(net.parameters()))
    gradient = torch.func.grad(lambda y: model(y, x).square().mean())(y)
    for value, other in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(value, other)


def test_a_tied_weight_is_one_parameter():
    net = filled(Tied())
    model, y = functional(net)
    x = sampled(5, 3, seed=9)
    assert list(y) == ["encode.weight"]
    (expected,) = torch.autograd.grad(net(x).square().mean(), tuple(net.parameters()))
    gradient = torch.func.grad(lambda y: model(y, x).square().mean())(y)
    torch.testing.assert_close(gradient["encode.weight"], expected)
    with pytest.raises(ValueError, match=r"decode\.weight.*a tied weight goes by its first name"):
        model({"decode.weight": y["encode.weight"]}, x)


def test_frozen_parameters_keep_their_values():
    net = filled(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    net[0].requires_grad_(False)
    model, y = functional(net)
    assert list(y) == ["1.weight", "1.bias"]
    x = sampled(5, 3, seed=9)
    assert torch.equal(model(y, x), net(x).detach())


def test_y_may_be_part_of_the_parameters():
    net = filled(nn.Linear(3, 2))
    model, y = functional(net)
    x = sampled(5, 3, seed=9)
    only = {"bias": torch.zeros(2, dtype=FLOAT64)}
    torch.testing.assert_close(model(only, x), x @ y["weight"].T)


def test_buffers_enter():
    net = filled(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).eval()
    net[1].running_mean.copy_(torch.tensor([1.0, 2.0]))
    net[1].running_var.copy_(torch.tensor([0.5, 4.0]))
    model, y = functional(net)
    x = sampled(5, 3, seed=9)
    assert torch.equal(model(y, x), net(x).detach())


def test_several_inputs_and_options():
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.form = nn.Bilinear(2, 3, 1)

        def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
            return scale * self.form(a, b)

    net = filled(Bilinear())
    model, y = functional(net)
    a, b = sampled(4, 2), sampled(4, 3, seed=1)
    assert torch.equal(model(y, a, b, scale=2.0), net(a, b, scale=2.0).detach())
    function, point = as_function(net, None)
    assert torch.equal(function(point, (a, b)), net(a, b).detach())


def test_passes_through_vmap():
    net = filled(nn.Linear(3, 2))
    model, y = functional(net)
    x, stacked = sampled(5, 3), {name: torch.stack([v, 2 * v]) for name, v in y.items()}
    together = torch.func.vmap(lambda y: model(y, x))(stacked)
    torch.testing.assert_close(together[1], model({n: 2 * v for n, v in y.items()}, x))


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        (nn.BatchNorm1d(3), r"1 is a BatchNorm1d .* couples its samples; call module.eval\(\)"),
        (nn.SyncBatchNorm(3), r"1 is a SyncBatchNorm .* couples"),
        (nn.Dropout(0.1), r"1 is a Dropout in training mode, which draws random numbers"),
        (nn.AlphaDropout(0.1), r"1 is a AlphaDropout .* random"),
        (nn.RReLU(), r"1 is a RReLU .* random"),
        (nn.InstanceNorm1d(3, track_running_stats=True), r"1 is a InstanceNorm1d .* moves its"),
        (nn.MultiheadAttention(3, 1, dropout=0.2), r"1 is a MultiheadAttention .* random"),
        (nn.LSTM(3, 3, num_layers=2, dropout=0.2), r"1 is a LSTM .* random"),
    ],
)
def test_what_is_no_function_of_one_sample_is_refused_by_name(layer, fault):
    net = nn.Sequential(nn.Linear(3, 3), layer)
    model, y = functional(net)
    with pytest.raises(ValueError, match=fault):
        model(y, torch.ones(3, 3))
    net.eval()
    if isinstance(layer, (nn.MultiheadAttention, nn.SyncBatchNorm)):
        return  # other inputs, or a GPU
    model(y, torch.ones(3, 3))
    net.train()  # the mode that counts is that of the call
    with pytest.raises(ValueError, match=fault):
        model(y, torch.ones(3, 3))


def test_batch_norm_without_statistics_is_refused_in_either_mode():
    model, y = functional(nn.BatchNorm1d(3, track_running_stats=False).eval())
    with pytest.raises(ValueError, match=r"module is a BatchNorm1d .* couples"):
        model(y, torch.ones(2, 3))


def test_layers_that_draw_nothing_pass_in_training_mode():
    net = filled(
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.LayerNorm(3), nn.GroupNorm(1, 3))
    )
    model, y = functional(net.train())
    assert model(y, sampled(2, 3)).shape == (2, 3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x).mean(1))


class TestAttention:
    """Torch's fused kernels have neither second derivatives nor a forward mode."""

    x, t = sampled(3, 5, 4), sampled(3, 2, seed=1)

    def build(self) -> nn.Module:
        return filled(Attention()).eval()

    def test_second_derivatives(self):
        net = self.build()
        model, y = functional(net)

        def loss(y):
            return ((model(y, self.x) - self.t) ** 4).mean()

        v = {name: sampled(*p.shape, seed=i) for i, (name, p) in enumerate(y.items())}
        gradient = torch.func.grad(loss)
        ends = [gradient({n: p + step * v[n] for n, p in y.items()}) for step in (1e-6, -1e-6)]
        for mode in ("reverse", "forward"):
            image = Hessian(loss, y, mode=mode) @ v
            for name in y:
                difference = (ends[0][name] - ends[1][name]) / 2e-6
                torch.testing.assert_close(image[name], difference, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_gauss_newton_and_fisher(self, chunk_size):
        net = self.build()
        model, y = functional(net)
        v = sampled(sum(p.numel() for p in y.values()), seed=3)
        space = Space.of(y)
        J = Jacobian(lambda y: model(y, self.x), y)
        expected = J.T @ (J @ v)
        A = GaussNewton(net, "mse", None, self.x, self.t, chunk_size=chunk_size)
        torch.testing.assert_close(A @ v, expected / 3)
        F = Fisher(net, "gaussian", None, self.x, chunk_size=chunk_size)
        torch.testing.assert_close(F @ space.unravel(v), space.unravel(expected / 3))

    def test_the_settings_of_torch_stay(self):
        model, y = functional(self.build())
        before = torch.backends.mha.get_fastpath_enabled()
        model(y, self.x)
        with pytest.raises(AssertionError, match="embedding dimension"):
            model(y, self.x[..., :3])
        assert torch.backends.mha.get_fastpath_enabled() == before
        assert torch.backends.cuda.flash_sdp_enabled()


def test_one_module_one_function():
    net, other = filled(nn.Linear(2, 1)), filled(nn.Linear(2, 1))
    assert functional(net)[0] == functional(net)[0]
    assert hash(functional(net)[0]) == hash(functional(net)[0])
    assert functional(net)[0] != functional(other)[0]
    before = functional(net)[0]
    net.weight = nn.Parameter(net.weight.detach().clone())
    assert functional(net)[0] != before


def test_unknown_names():
    model, y = functional(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"y names \['wieght'\], which Linear has not.*weight"):
        model({**y, "wieght": y["weight"]}, torch.ones(1, 3))


def test_not_a_module():
    with pytest.raises(TypeError, match=r"module is a function; expected a torch.nn.Module"):
        functional(lambda x: x)
    with pytest.raises(TypeError, match=r"model is a int; expected"):
        as_function(3, {})
    with pytest.raises(TypeError, match=r"y is None; it stands for a module's parameters"):
        as_function(lambda y, x: x, None)
    with pytest.raises(ValueError, match=r"functional\(Linear\) requires gradients; pass y"):
        as_function(nn.Linear(2, 1).requires_grad_(False), None)


def test_pickles():
    net = filled(nn.Linear(3, 2))
    model, y = functional(net)
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, FunctionalModule)
    assert torch.equal(again(y, torch.ones(1, 3, dtype=FLOAT64)), model(y, sampled(1, 3) * 0 + 1))
