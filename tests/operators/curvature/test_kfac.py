"""K-FAC against exact Fisher blocks, its definition position by position, and dense algebra.

Where K-FAC is exact (one sample, deep linear networks) the oracle is the Fisher matrix itself, from
Jacobians by torch.func; elsewhere the definition of the factors, from Jacobians in perturbations of
the layers' outputs; and curvlinops, where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from operators import Diagonal, Identity, Space
from operators.curvature.kfac import KFAC
from operators.curvature.kfac_stream import KFACStream
from operators.curvature.kronecker_factors import Factors
from operators.curvature.likelihood import Categorical, Gaussian, likelihood_of
from operators.inverse import Inverse

FLOAT64 = torch.float64
STYLES = ["factored", "tikhonov"]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Float64 parameters that do not depend on torch's global generator."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p[0].numel())
            )
    return module


def semidefinite(*shape: int, seed: int = 0) -> Tensor:
    root = numbers(*shape, shape[-1] + 1, seed=seed)
    return root @ root.mT / shape[-1]


def close(actual: Any, expected: Any, rtol: float = 1e-11, atol: float = 1e-13) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def mlp(*sizes: int, bias: bool = True, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return seeded(nn.Sequential(*layers[:-1]))


def deep_linear(*sizes: int) -> nn.Module:
    return seeded(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))))


def small_cnn(size: tuple[int, int] = (6, 5), **first: Any) -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(2, 4, 3, **first)
    body = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2, bias=False), nn.Tanh())
    x = numbers(4, 2, *size)
    width = body(x.float()).flatten(1).shape[1]
    return seeded(nn.Sequential(*body, nn.Flatten(), nn.Linear(width, 3))), x


def names_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def exact_fisher(module: nn.Module, likelihood: Any, x: Tensor) -> Tensor:
    """``(1/M) sum_m J_m^T H_m J_m`` over the flat parameters."""
    y, likelihood = names_of(module), likelihood_of(likelihood)
    space = Space.of(y)

    def model(flat: Tensor) -> Tensor:
        return likelihood.terms(functional_call(module, space.unravel(flat), (x,)))

    flat = space.ravel(y)
    f, J = model(flat), jacrev(model)(flat)  # (M, C), (M, C, n)
    root = torch.stack([torch.zeros_like(f), *likelihood.columns(f)])  # (K, M, C)
    rows = torch.einsum("kmc,mcn->kmn", root, J).flatten(0, 1)
    return rows.T @ rows / len(f)


def blocks(K: KFAC, matrix: Tensor) -> dict[str, Tensor]:
    """Diagonal block of each layer; the parameters of a layer are neighbours."""
    sizes: dict[str, int] = {}
    for name, shape in zip(
        K.domain.unravel(torch.arange(K.shape[0])), K.domain.shapes, strict=True
    ):
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + shape.numel()
    out, start = {}, 0
    for layer, size in sizes.items():
        out[layer] = matrix[start : start + size, start : start + size]
        start += size
    return out


def dense_of(
    K: KFAC, factors: dict[str, tuple[Tensor, Tensor]], act: Callable[..., Tensor]
) -> Tensor:
    """Matrix of ``V -> act(S, A, vec V)`` layer by layer, from explicit Kronecker products."""
    columns = []
    for e in torch.eye(K.shape[0], dtype=K.dtype):
        tree = K.domain.unravel(e)
        image = {}
        for layer, (S, A) in factors.items():
            prefix = f"{layer}." if layer else ""
            weight, bias = tree.get(f"{prefix}weight"), tree.get(f"{prefix}bias")
            stacked = S if S.ndim == 3 else S[None]
            others = A if A.ndim == 3 else A[None]
            parts = []
            if weight is not None:
                parts.append(weight.reshape(len(stacked), stacked.shape[-1], -1))
            if bias is not None:
                parts.append(bias.reshape(len(stacked), stacked.shape[-1], 1))
            V = torch.cat(parts, -1)
            out = torch.stack(
                [
                    (act(s, a) @ v.reshape(-1)).reshape(v.shape)
                    for s, a, v in zip(stacked, others, V, strict=True)
                ]
            )
            if bias is not None:
                image[f"{prefix}bias"] = out[..., -1].reshape(bias.shape)
                out = out[..., :-1]
            if weight is not None:
                image[f"{prefix}weight"] = out.reshape(weight.shape)
        columns.append(torch.cat([image[name].reshape(-1) for name in tree]))
    return torch.stack(columns, 1)


def damped(style: str, level: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``(S, A) -> matrix`` of the damped Kronecker product, by the formulas of the paper."""

    def matrix(S: Tensor, A: Tensor) -> Tensor:
        p, d = len(S), len(A)
        I_p, I_d = torch.eye(p, dtype=S.dtype), torch.eye(d, dtype=S.dtype)
        if style == "tikhonov":
            return torch.kron(S, A) + level * torch.eye(p * d, dtype=S.dtype)
        pi = torch.sqrt((A.trace() / d) / (S.trace() / p))
        return torch.kron(S + math.sqrt(level) / pi * I_p, A + pi * math.sqrt(level) * I_d)

    return matrix


SPACE = Space.of(
    {
        "a.weight": torch.zeros(3, 2, dtype=FLOAT64),
        "a.bias": torch.zeros(3, dtype=FLOAT64),
        "b.weight": torch.zeros(4, 1, 2, 1, dtype=FLOAT64),  # two groups of two filters
        "b.bias": torch.zeros(4, dtype=FLOAT64),
        "c.weight": torch.zeros(2, 2, dtype=FLOAT64),
        "d.bias": torch.zeros(2, dtype=FLOAT64),
    }
)


def some_factors(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "a": (semidefinite(3, seed=seed), semidefinite(3, seed=seed + 1)),
        "b": (semidefinite(2, 2, seed=seed + 2), semidefinite(2, 3, seed=seed + 3)),
        "c": (semidefinite(2, seed=seed + 4), semidefinite(2, seed=seed + 5)),
        "d": (semidefinite(2, seed=seed + 6), semidefinite(1, seed=seed + 7)),
    }


class TestExactCases:
    @pytest.mark.parametrize("bias", [True, False])
    @settings(deadline=None, max_examples=15)
    @given(n=st.integers(1, 6), d=st.integers(1, 4), c=st.integers(1, 4), v=st.floats(0.1, 5.0))
    def test_one_linear_layer_with_squares(self, bias, n, d, c, v):
        layer, x = seeded(nn.Linear(d, c, bias=bias)), numbers(n, d, seed=1)
        K = KFAC.from_module(layer, Gaussian(variance=v), x)
        close(K.factors[""].S, torch.eye(c, dtype=FLOAT64) / v)
        close(K.to_dense(), exact_fisher(layer, Gaussian(variance=v), x))

    @pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
    @pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
    def test_batch_of_one(self, likelihood, weight_sharing):
        net, x = mlp(3, 4, 2, 3), numbers(1, 3, seed=2)
        K = KFAC.from_module(net, likelihood, x, weight_sharing=weight_sharing)
        exact = blocks(K, exact_fisher(net, likelihood, x))
        for layer, block in blocks(K, K.to_dense()).items():
            close(block, exact[layer])

    def test_batch_of_one_through_a_convolution_of_one_position(self):
        conv = nn.Conv2d(2, 4, (2, 3), groups=2)
        net = seeded(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))
        x = numbers(1, 2, 2, 3)
        K = KFAC.from_module(net, "categorical", x)
        assert K.factors["0"].S.shape == (2, 2, 2)
        exact = blocks(K, exact_fisher(net, "categorical", x))
        dense = blocks(K, K.to_dense())
        close(dense["3"], exact["3"])
        # The groups of a convolution are layers of their own: theirs are the blocks compared.
        weights = exact["0"].clone()
        group = torch.arange(2 * 2 * 6 + 4)
        group = torch.where(group < 24, group // 12, (group - 24) // 2)
        weights[group[:, None] != group[None]] = 0
        close(dense["0"], weights)

    def test_deep_linear_networks_of_any_batch(self):
        net, x = deep_linear(3, 4, 2, 3), numbers(7, 3)
        K = KFAC.from_module(net, "gaussian", x)
        exact = blocks(K, exact_fisher(net, "gaussian", x))
        for layer, block in blocks(K, K.to_dense()).items():
            close(block, exact[layer])

    def test_expand_is_exact_where_every_position_has_its_loss(self):
        # Eschenhagen et al. (2023), section 3.2: a deep linear network on each of several positions
        net, x = deep_linear(3, 2, 2), numbers(4, 5, 3)
        K = KFAC.from_module(net, "gaussian", x, weight_sharing="expand")
        exact = blocks(K, exact_fisher(net, "gaussian", x))
        for layer, block in blocks(K, K.to_dense()).items():
            close(block, exact[layer])

    def test_reduce_is_exact_where_positions_are_averaged(self):
        # Eschenhagen et al. (2023), section 3.3
        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = deep_linear(3, 2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.layers(x).mean(1)

        net, x = Pooled(), numbers(4, 5, 3)
        exact = exact_fisher(net, "gaussian", x)
        K = KFAC.from_module(net, "gaussian", x, weight_sharing="reduce")
        for layer, block in blocks(K, K.to_dense()).items():
            close(block, blocks(K, exact)[layer])
        expanded = KFAC.from_module(net, "gaussian", x, weight_sharing="expand")
        first = "layers.0"
        assert not torch.allclose(blocks(K, expanded.to_dense())[first], blocks(K, exact)[first])

    def test_the_hessian_of_a_softmax_model_on_one_sample_is_the_fisher(self):
        layer, x = seeded(nn.Linear(3, 4)), numbers(1, 3)
        y = names_of(layer)
        space = Space.of(y)
        loss = nn.CrossEntropyLoss()

        def value(flat: Tensor) -> Tensor:
            return loss(functional_call(layer, space.unravel(flat), (x,)), torch.tensor([2]))

        hessian = torch.func.hessian(value)(space.ravel(y))
        close(KFAC.from_module(layer, loss, x).to_dense(), hessian)

    def test_the_batch_factor_is_that_of_the_mean_loss(self):
        net, x = mlp(3, 4, 3), numbers(5, 3)
        once, thrice = (KFAC.from_module(net, "categorical", t) for t in (x, x.repeat(3, 1)))
        close(once.to_dense(), thrice.to_dense())


def definition(
    net: nn.Module, layer: str, x: Tensor, likelihood: Any, weight_sharing: str
) -> tuple[Tensor, Tensor]:
    """S and A of the definition, by a Jacobian in a perturbation of the layer's output."""
    likelihood, part = likelihood_of(likelihood), net.get_submodule(layer)
    seen: dict[str, Tensor] = {}

    def run(shift: Tensor | None) -> Tensor:
        def hook(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> Tensor:
            seen["x"], seen["z"] = args[0], z
            return z.clone() if shift is None else z + shift

        handle = part.register_forward_hook(hook)
        try:
            return likelihood.terms(net(x))
        finally:
            handle.remove()

    f = run(None).detach()
    inputs, z = seen["x"].detach().clone(), seen["z"].detach()
    J = jacrev(run)(torch.zeros_like(z)).detach()  # (M, C, *z.shape)
    root = torch.stack(list(likelihood.columns(f)))
    scores = torch.einsum("kmc,mc...->km...", root, J).flatten(0, 1)  # (KM, *z.shape)
    if isinstance(part, nn.Conv2d):
        G, p = part.groups, part.out_channels // part.groups
        scores = scores.reshape(-1, len(x), G, p, z.shape[2:].numel()).movedim(3, -1)
        # Patches by a convolution that picks single entries, group by group.
        depth = part.weight[0].numel()
        picker = nn.Conv2d(
            part.in_channels,
            G * depth,
            part.kernel_size,
            part.stride,
            part.padding,
            part.dilation,
            G,
            bias=False,
            padding_mode=part.padding_mode,
        ).double()
        picker.weight.data = (
            torch.eye(depth, dtype=FLOAT64).repeat(G, 1).reshape(picker.weight.shape)
        )
        a = picker(inputs).detach().reshape(len(x), G, depth, -1).mT  # (N, G, R, depth)
    else:
        scores = scores.reshape(len(scores), len(x), 1, -1, z.shape[-1])
        a = inputs.reshape(len(x), 1, -1, inputs.shape[-1])
    if part.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    if weight_sharing == "reduce":
        a, scores = a.mean(2, keepdim=True), scores.sum(3, keepdim=True)
    A = torch.einsum("ngrd,ngre->gde", a, a) / (a.shape[0] * a.shape[2])
    S = torch.einsum("kngrp,kngrq->gpq", scores, scores) / len(f)
    return (S, A) if len(S) > 1 else (S[0], A[0])


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": (2, 1), "padding": (1, 2)},
    "dilation": {"dilation": (2, 1), "padding": 1},
    "same": {"padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 0), "padding_mode": "circular"},
    "groups": {"groups": 2, "padding": 1, "stride": 2},
    "no bias": {"bias": False},
}


class TestDefinition:
    @pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
    @pytest.mark.parametrize("first", CONVOLUTIONS)
    def test_convolutions(self, first, weight_sharing):
        net, x = small_cnn(**CONVOLUTIONS[first])
        K = KFAC.from_module(net, "categorical", x, weight_sharing=weight_sharing)
        assert list(K.factors) == ["0", "2", "5"]
        for layer, pair in K.factors.items():
            S, A = definition(net, layer, x, "categorical", weight_sharing)
            close(pair.S, S)
            close(pair.A, A)

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize("kernel", [2, 4])
    def test_same_padding_of_an_even_kernel(self, kernel):
        conv = nn.Conv2d(1, 2, kernel, padding="same")
        net = seeded(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(2 * 20, 2)))
        x = numbers(3, 1, 5, 4)
        K = KFAC.from_module(net, "categorical", x)
        close(K.factors["0"].A, definition(net, "0", x, "categorical", "expand")[1])

    @pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
    @pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
    def test_several_loss_terms_a_sample_that_depend_on_all_positions(
        self, likelihood, weight_sharing
    ):
        class Mixing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:  # (N, T, 3) -> (N, T, 2)
                z = torch.tanh(self.first(x))
                z = self.second(z + 0.5 * z.roll(1, 1))
                return z.mT if likelihood == "categorical" else z

        net, x = seeded(Mixing()), numbers(4, 3, 3)
        K = KFAC.from_module(net, likelihood, x, weight_sharing=weight_sharing)
        for layer, pair in K.factors.items():
            S, A = definition(net, layer, x, likelihood, weight_sharing)
            close(pair.S, S)
            close(pair.A, A)

    @pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
    def test_empirical_from_gradients_sample_by_sample(self, activation):
        net, x = mlp(3, 4, 2, activation=activation), numbers(6, 3)
        t = torch.tensor([0, 1, 1, 0, 1, 0])
        K = KFAC.from_module(net, "categorical", x, t, fisher="empirical")
        y, loss = names_of(net), nn.CrossEntropyLoss()

        def value(y: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
            return loss(functional_call(net, y, (x[None],)), t[None])

        gradients = vmap(grad(value), (None, 0, 0))(y, x, t)
        # The gradient in a bias is the score at the output of the layer.
        for layer, pair in K.factors.items():
            s = gradients[f"{layer}.bias"]
            close(pair.S, s.T @ s / 6)

    def test_sampled_labels_in_expectation(self):
        net, x = mlp(3, 4, 3), numbers(5, 3)
        exact = KFAC.from_module(net, "categorical", x)
        sampled = KFAC.from_module(net, "categorical", x, fisher="mc", mc_samples=4000)
        for layer, pair in exact.factors.items():
            close(sampled.factors[layer].A, pair.A)
            error = (sampled.factors[layer].S - pair.S).norm() / pair.S.norm()
            assert 0 < float(error) < 0.03

    def test_sampling_follows_the_generator(self):
        net, x = mlp(3, 4, 3), numbers(5, 3)

        def drawn(seed: int | None) -> Tensor:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            K = KFAC.from_module(net, "categorical", x, fisher="mc", generator=generator)
            return K.to_dense()

        assert torch.equal(drawn(3), drawn(3))
        assert torch.equal(drawn(None), drawn(0))
        assert not torch.equal(drawn(3), drawn(4))

    def test_forward_only_has_no_scores(self):
        net, x = small_cnn(groups=2)
        K = KFAC.from_module(net, "categorical", x, fisher="forward-only")
        exact = KFAC.from_module(net, "categorical", x)
        for layer, pair in K.factors.items():
            close(pair.A, exact.factors[layer].A)
            close(pair.S, torch.eye(pair.S.shape[-1], dtype=FLOAT64).expand_as(pair.S))

    def test_selected_parameters_have_the_factors_they_have_among_all(self):
        net, x = mlp(3, 4, 3, 2), numbers(5, 3)
        everything = KFAC.from_module(net, "categorical", x)
        some = KFAC.from_module(net, "categorical", x, parameters=["4", "2.weight", "0.bias"])
        assert list(some.domain.unravel(torch.arange(some.shape[0], dtype=FLOAT64))) == [
            "0.bias",
            "2.weight",
            "4.weight",
            "4.bias",
        ]
        for layer, pair in some.factors.items():
            close(pair.S, everything.factors[layer].S)
        close(some.factors["4"].A, everything.factors["4"].A)
        close(some.factors["2"].A, everything.factors["2"].A[:-1, :-1])
        close(some.factors["0"].A, torch.ones(1, 1, dtype=FLOAT64))

    def test_frozen_parameters_are_left_out(self):
        net, x = mlp(3, 4, 2), numbers(5, 3)
        net.get_submodule("0").requires_grad_(False)
        K = KFAC.from_module(net, "categorical", x)
        assert list(K.factors) == ["2"]

    def test_inputs_as_tuple_and_as_dictionary(self):
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, x: Tensor, shift: Tensor) -> Tensor:
                return self.layer(input=x + shift)

        net, x = seeded(Two()), numbers(4, 3)
        one = KFAC.from_module(net, "gaussian", (x, torch.ones_like(x)))
        two = KFAC.from_module(net, "gaussian", {"shift": torch.ones_like(x), "x": x})
        close(one.to_dense(), two.to_dense())

    def test_dtype_is_kept(self):
        net = mlp(3, 4, 2).float()
        K = KFAC.from_module(net, "categorical", numbers(5, 3).float(), damping=0.1)
        assert K.dtype == torch.float32
        assert all(t.dtype == torch.float32 for t in (*K.tensors, *K.inverse().tensors))
        for style in STYLES:
            A = KFAC(K.factors, K.domain, 0.1, damping_style=style)
            v = numbers(K.shape[0]).float()
            torch.testing.assert_close(A.inverse() @ (A @ v), v, rtol=1e-3, atol=1e-3)


class TestAgainstCurvlinops:
    LOSSES = (nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss())

    @pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
    @pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
    @pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
    @pytest.mark.parametrize("kind", ["mlp", "cnn"])
    def test_products(self, kind, weight_sharing, fisher, loss):
        curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is an optional oracle")
        if kind == "mlp":
            net, x = mlp(3, 5, 4, 3), numbers(6, 3)
        else:
            net, x = small_cnn(padding=1, stride=2)
        t = torch.arange(len(x)) % 3
        targets = (
            t if isinstance(loss, nn.CrossEntropyLoss) else nn.functional.one_hot(t, 3).double()
        )
        theirs = curvlinops.KFACLinearOperator(
            net,
            loss,
            list(net.parameters()),
            [(x, targets)],
            fisher_type=fisher,
            kfac_approx=weight_sharing,
            separate_weight_and_bias=False,
        )
        ours = KFAC.from_module(net, loss, x, targets, fisher=fisher, weight_sharing=weight_sharing)
        block = numbers(ours.shape[0], 3)
        close(ours @ block, theirs @ block)

    def test_labels_drawn_by_either_agree_in_expectation(self):
        curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is an optional oracle")
        net, x = mlp(2, 3, 3), numbers(4, 2)
        t = torch.zeros(4, dtype=torch.int64)
        theirs = curvlinops.KFACLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            list(net.parameters()),
            [(x, t)],
            fisher_type="mc",
            mc_samples=3000,
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        ours = KFAC.from_module(net, "categorical", x, fisher="mc", mc_samples=3000)
        dense = ours.to_dense()
        other = theirs @ torch.eye(len(dense), dtype=FLOAT64)
        assert float((dense - other).norm() / dense.norm()) < 0.05


class TestDamping:
    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize("level", [0.0, 1e-3, 2.0])
    def test_products_and_inverses_beside_matrices(self, style, level):
        factors = some_factors()
        K = KFAC(factors, SPACE, level, damping_style=style)
        M = dense_of(K, factors, damped(style, level))
        close(K.to_dense(), M)
        v, block = numbers(len(M)), numbers(len(M), 3)
        close(K @ v, M @ v)
        close(K @ block, M @ block)
        close(K @ block[:, :0], M @ block[:, :0])
        close(SPACE.ravel(K @ SPACE.unravel(v)), M @ v)
        inverse = K.inverse()
        N = torch.linalg.inv(M)
        close(inverse.to_dense(), N, rtol=1e-8, atol=1e-8 * float(N.abs().max()))
        close(inverse @ (K @ v), v, rtol=1e-8, atol=1e-8)
        close(inverse @ (K @ block), block, rtol=1e-8, atol=1e-8)
        close(inverse.T @ (M @ v), v, rtol=1e-8, atol=1e-8)
        assert SPACE.holds(inverse @ SPACE.unravel(v))
        assert float(K.damping) == level
        assert K.damping_style == style

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize("level", [0.0, 0.3])
    def test_exact_numbers(self, style, level):
        factors = some_factors()
        K = KFAC(factors, SPACE, level, damping_style=style)
        M = K.to_dense()
        close(K._exact_diagonal(), M.diagonal())
        close(K._exact_trace(), M.trace())
        close(K._exact_logdet(), torch.linalg.slogdet(M).logabsdet, rtol=1e-9)
        close(K.inverse()._exact_logdet(), -torch.linalg.slogdet(M).logabsdet, rtol=1e-9)

    def test_factored_damping_in_its_parts(self):
        S, A = some_factors()["a"]
        pair = Factors(S, A)
        level = torch.tensor(0.2, dtype=FLOAT64)
        pi = torch.sqrt(A.trace() / S.trace())  # p = d = 3
        close(pair.damped(level).S, S + math.sqrt(0.2) / pi * torch.eye(3, dtype=FLOAT64))
        close(pair.damped(level).A, A + math.sqrt(0.2) * pi * torch.eye(3, dtype=FLOAT64))

    @settings(deadline=None, max_examples=15)
    @given(c=st.floats(1e-3, 1e3), level=st.floats(0.0, 2.0))
    def test_how_the_product_is_split_does_not_matter(self, c, level):
        factors = some_factors()
        moved = {name: (S / c, A * c) for name, (S, A) in factors.items()}
        one, two = (KFAC(f, SPACE, level).to_dense() for f in (factors, moved))
        close(one, two, rtol=1e-10, atol=1e-12)

    def test_a_factor_of_zeros(self):
        zero = {name: (0 * S, A) for name, (S, A) in some_factors().items()}
        K = KFAC(zero, SPACE, 0.25)
        M = dense_of(K, zero, lambda S, A: torch.kron(S + 0.5 * _eye(S), A + 0.5 * _eye(A)))
        close(K.to_dense(), M)
        close(K.inverse().to_dense(), torch.linalg.inv(M), rtol=1e-8)
        gradient = grad(lambda K: (K @ numbers(K.shape[0])).sum())(K)
        assert all(bool(t.isfinite().all()) for t in gradient.tensors)

    @pytest.mark.parametrize("style", STYLES)
    def test_singular_factors_need_damping(self, style):
        S, A = torch.ones(2, 2, dtype=FLOAT64), semidefinite(3)
        space = Space.of({"weight": torch.zeros(2, 3, dtype=FLOAT64)})
        with pytest.raises(ValueError, match=r"S of layer '' is singular.*larger damping"):
            KFAC({"": (S, A)}, space, damping_style=style).inverse()
        K = KFAC({"": (S, A)}, space, 1e-6, damping_style=style)
        v = numbers(6)
        close(K @ (K.inverse() @ v), v, rtol=1e-6, atol=1e-8)

    def test_the_inverse_of_a_factored_one_is_a_kfac(self):
        K = KFAC(some_factors(), SPACE, 0.1)
        inverse = K.inverse()
        assert isinstance(inverse, KFAC)
        assert inverse.positive_definite
        close(inverse.inverse().to_dense(), K.to_dense(), rtol=1e-8, atol=1e-10)
        assert isinstance(
            KFAC(some_factors(), SPACE, 0.1, damping_style="tikhonov").inverse(), Inverse
        )


def _eye(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype)


class TestAlgebra:
    def test_facts(self):
        undamped, K = KFAC(some_factors(), SPACE), KFAC(some_factors(), SPACE, 0.1)
        assert undamped.positive_semidefinite
        assert not undamped.positive_definite
        assert K.positive_definite
        assert K.symmetric
        assert K.block_diagonal
        assert K.T is K
        # 2 p d (p + d) for the four layers, two groups in one of them, and the damping
        assert K.cost.flops == 2 * (9 * 7 + 2 * 6 * 6 + 4 * 5 + 2 * 4)
        assert "a: 3 x 3, b: 2 x 3, c: 2 x 2, d: 2 x 1; factored damping" in str(K)

    def test_a_claim_that_is_false(self):
        factors = some_factors()
        factors["a"] = (-factors["a"][0], factors["a"][1])
        with pytest.raises(ValueError, match="positive semidefinite"):
            KFAC(factors, SPACE) @ numbers(SPACE.size)

    @pytest.mark.parametrize("style", STYLES)
    def test_multiples_stay_kronecker_factored(self, style):
        K = KFAC(some_factors(), SPACE, 0.3, damping_style=style)
        scaled = 2.5 * K
        assert isinstance(scaled, KFAC)
        assert scaled.positive_definite
        assert float(scaled.damping) == pytest.approx(0.75)
        close(scaled.to_dense(), 2.5 * K.to_dense())
        close((-2.0 * K).to_dense(), -2.0 * K.to_dense())
        close((torch.tensor(2.0, dtype=FLOAT64) * K).to_dense(), 2.0 * K.to_dense())
        assert (2.0 * K.inverse()).positive_definite

    def test_a_multiple_of_the_identity_is_more_damping(self):
        K = KFAC(some_factors(), SPACE, 0.3, damping_style="tikhonov")
        more = K + 0.2 * Identity(SPACE.size)
        assert isinstance(more, KFAC)
        assert float(more.damping) == pytest.approx(0.5)
        close(more.to_dense(), K.to_dense() + 0.2 * _eye(K.to_dense()))
        less = K - 1.0 * Identity(SPACE)
        assert not less.positive_semidefinite
        close(less.to_dense(), K.to_dense() - _eye(K.to_dense()))
        factored = KFAC(some_factors(), SPACE, 0.3) + 0.2 * Identity(SPACE)
        assert factored.positive_definite
        d = numbers(SPACE.size).abs()
        close((K + Diagonal(d, SPACE)).to_dense(), K.to_dense() + torch.diag(d))


class TestDerivatives:
    """Against the same map written with explicit Kronecker products, as functions of tensors."""

    space = Space.of(
        {"weight": torch.zeros(2, 2, dtype=FLOAT64), "bias": torch.zeros(2, dtype=FLOAT64)}
    )

    def parts(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        return numbers(2, 2, seed=seed), numbers(3, 3, seed=seed + 1), torch.tensor(0.3).double()

    def build(self, style: str, inverse: bool, root: Tensor, stem: Tensor, level: Tensor) -> Any:
        S, A = (r @ r.mT + 0.1 * _eye(r) for r in (root, stem))
        K = KFAC({"": (S, A)}, self.space, level, damping_style=style)
        return K.inverse() if inverse else K

    def matrix(
        self, style: str, inverse: bool, root: Tensor, stem: Tensor, level: Tensor
    ) -> Tensor:
        S, A = (r @ r.mT + 0.1 * _eye(r) for r in (root, stem))
        if style == "tikhonov":
            M = torch.kron(S, A) + level * torch.eye(6, dtype=FLOAT64)
        else:
            pi = torch.sqrt((A.trace() / 3) / (S.trace() / 2))
            M = torch.kron(S + level.sqrt() / pi * _eye(S), A + pi * level.sqrt() * _eye(A))
        # Rows of the weight with the bias last, in the order of the flat vector.
        order = torch.tensor([0, 1, 3, 4, 2, 5])
        M = M[order][:, order]
        return torch.linalg.inv(M) if inverse else M

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("style", STYLES)
    def test_of_every_order_and_mode(self, style, inverse):
        p, v, u = self.parts(), numbers(6, seed=7), numbers(6, seed=8)
        moved = (*(numbers(*t.shape, seed=9 + i) for i, t in enumerate(p)), numbers(6, seed=20))

        def ours(*args: Tensor) -> Tensor:
            return self.build(style, inverse, *args[:3]) @ args[3]

        def theirs(*args: Tensor) -> Tensor:
            return self.matrix(style, inverse, *args[:3]) @ args[3]

        def close_all(measure: Callable[[Any], Any]) -> None:
            for one, two in zip(measure(ours), measure(theirs), strict=True):
                close(one, two, rtol=1e-7, atol=1e-8)

        close_all(lambda f: jvp(f, (*p, v), moved))
        close_all(lambda f: vjp(f, *p, v)[1](u))
        arguments = (0, 1, 2, 3)

        def slope(f: Any) -> Any:
            return lambda *args: grad(lambda *a: (u * f(*a)).sin().sum(), arguments)(*args)

        close_all(lambda f: jvp(slope(f), (*p, v), moved)[1])
        close_all(
            lambda f: grad(
                lambda *a: sum((g * m).sum() for g, m in zip(slope(f)(*a), moved, strict=True)),
                arguments,
            )(*p, v)
        )

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("style", STYLES)
    def test_batches_of_operators(self, style, inverse):
        several = [self.parts(seed) for seed in (0, 10, 20)]
        stacked = tuple(torch.stack(t) for t in zip(*several, strict=True))
        V = numbers(3, 6)

        def ours(*args: Tensor) -> Tensor:
            return self.build(style, inverse, *args[:3]) @ args[3]

        expected = torch.stack(
            [self.matrix(style, inverse, *p) @ v for p, v in zip(several, V, strict=True)]
        )
        close(vmap(ours)(*stacked, V), expected, rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("style", STYLES)
    def test_with_respect_to_the_operator(self, style):
        K = KFAC(some_factors(), SPACE, 0.2, damping_style=style)
        v, u = numbers(SPACE.size), numbers(SPACE.size, seed=1)
        gradient = grad(lambda K: u @ (K @ v))(K)
        direction = [numbers(*t.shape, seed=30 + i) for i, t in enumerate(K.tensors)]
        h = 1e-6
        ahead, behind = (
            K.with_tensors(
                tuple(t + s * h * d for t, d in zip(K.tensors, direction, strict=True))
            )._matvec(v)
            for s in (1, -1)
        )
        slope = u @ (ahead - behind) / (2 * h)
        pairs = zip(gradient.tensors, direction, strict=True)
        close(sum((g * d).sum() for g, d in pairs), slope, rtol=1e-6)

    @pytest.mark.parametrize("style", STYLES)
    def test_without_damping_other_derivatives_stay_finite(self, style):
        K = KFAC(some_factors(), SPACE, damping_style=style)
        v = numbers(SPACE.size)
        tangents = [torch.zeros_like(t) for t in K.tensors]
        tangents[0] = semidefinite(3, seed=40)
        _, along = jvp(lambda *t: K.with_tensors(t) @ v, K.tensors, tuple(tangents))
        moved = {**some_factors(), "a": (tangents[0], some_factors()["a"][1])}
        alone = {
            name: pair if name == "a" else (0 * pair[0], pair[1]) for name, pair in moved.items()
        }
        close(along, KFAC(alone, SPACE) @ v)


class TestStream:
    def batches(self) -> list[Tensor]:
        return [numbers(n, 3, seed=n) for n in (4, 7, 2, 5)]

    @pytest.mark.parametrize("rho", [0.05, 0.4, 1.0])
    @pytest.mark.parametrize("warmup", [True, False])
    def test_recursion_along_a_trajectory(self, rho, warmup):
        net = mlp(3, 4, 2)
        stream = KFACStream(net, "categorical", damping=0.1, rho=rho, warmup=warmup)
        averages: dict[str, list[Tensor]] = {}
        for k, x in enumerate(self.batches(), start=1):
            with torch.no_grad():
                net[0].weight += 0.1
            stream.update(x)
            share = 1.0 if k == 1 else max(rho, 1 / k) if warmup else rho
            for layer, pair in KFAC.from_module(net, "categorical", x).factors.items():
                old = averages.get(layer, [torch.zeros_like(t) for t in pair])
                averages[layer] = [
                    (1 - share) * a + share * b for a, b in zip(old, pair, strict=True)
                ]
        K = stream.operator()
        assert len(stream) == 4
        for layer, pair in averages.items():
            close(list(K.factors[layer]), pair)
        close(K.damping, torch.tensor(0.1, dtype=FLOAT64))

    def test_smoothing_in_closed_form(self):
        net, rho = mlp(3, 4, 2), 0.3
        stream = KFACStream(net, "categorical", damping=0.0, rho=rho)
        singles = []
        for x in self.batches():
            stream.update(x)
            singles.append(KFAC.from_module(net, "categorical", x).factors["2"])
        weights = [(1 - rho) ** 3, *(rho * (1 - rho) ** (4 - k) for k in (2, 3, 4))]
        assert sum(weights) == pytest.approx(1.0)
        for i in (0, 1):
            expected = sum(w * pair[i] for w, pair in zip(weights, singles, strict=True))
            close(stream.operator().factors["2"][i], expected)

    def test_the_exact_mean_is_that_of_the_whole_data(self):
        net, x = mlp(3, 4, 2), torch.cat(self.batches())
        stream = KFACStream(net, "categorical", damping=0.1)
        for batch in self.batches():
            stream.update(batch)
        whole = KFAC.from_module(net, "categorical", x, damping=0.1)
        close(stream.operator().to_dense(), whole.to_dense())

    def test_operators_stay_and_reset_forgets(self):
        net, (first, second, *_) = mlp(3, 4, 2), self.batches()
        stream = KFACStream(net, "categorical", damping=0.1, rho=0.5)
        with pytest.raises(RuntimeError, match="update"):
            stream.operator()
        stream.update(first)
        before = stream.operator()
        dense = before.to_dense()
        stream.update(second)
        assert torch.equal(before.to_dense(), dense)
        stream.reset()
        assert len(stream) == 0
        stream.update(first)
        assert torch.equal(stream.operator().to_dense(), dense)

    def test_labels_are_drawn_anew_for_every_batch(self):
        net, x = mlp(3, 4, 3), numbers(5, 3)
        stream = KFACStream(net, "categorical", damping=0.0, rho=1.0, fisher="mc")
        stream.update(x)
        first = stream.operator().to_dense()
        stream.update(x)
        assert not torch.equal(stream.operator().to_dense(), first)

    def test_a_refused_batch_leaves_the_average(self):
        net, x = mlp(3, 4, 2), numbers(4, 3)
        stream = KFACStream(net, "categorical", damping=0.1, rho=0.5)
        stream.update(x)
        dense = stream.operator().to_dense()
        with pytest.raises(ValueError, match="not finite"):
            stream.update(x * math.nan)
        assert len(stream) == 1
        assert torch.equal(stream.operator().to_dense(), dense)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"damping": -1.0}, "damping=-1.0"),
            ({"damping": math.nan}, "damping=nan"),
            ({"damping": 0.1, "rho": 0.0}, "rho=0.0"),
            ({"damping": 0.1, "rho": 1.5}, "rho=1.5"),
            ({"damping": 0.1, "warmup": True}, "warmup"),
            ({"damping": 0.1, "damping_style": "none"}, "damping_style='none'"),
        ],
    )
    def test_settings_that_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            KFACStream(mlp(3, 2), "categorical", **options)


class TestTheModuleStaysAsItWas:
    def network(self) -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
        net = seeded(net).eval()
        net[0].weight.requires_grad_(False)
        net[4].weight.grad = torch.ones(2, 8, dtype=FLOAT64)
        return net

    def state(self, net: nn.Module) -> Any:
        return (
            {name: value.clone() for name, value in net.state_dict().items()},
            [
                (p.requires_grad, None if p.grad is None else p.grad.clone())
                for p in net.parameters()
            ],
            [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in net.modules()],
            [id(p) for p in net.parameters()],
            torch.get_rng_state(),
        )

    @pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
    def test_after_success(self, fisher):
        net, x = self.network(), numbers(3, 1, 3, 3)
        before = self.state(net)
        KFAC.from_module(
            net, "categorical", x, torch.tensor([0, 1, 1]), fisher=fisher, parameters=["0", "4"]
        )
        torch.testing.assert_close(self.state(net), before, rtol=0, atol=0)

    def test_after_an_exception(self):
        net = self.network()
        before = self.state(net)
        for x in (numbers(3, 1, 4, 4), numbers(3, 1, 3, 3) * math.nan):
            with pytest.raises((RuntimeError, ValueError)):
                KFAC.from_module(net, "categorical", x, parameters=["0", "4"])
        torch.testing.assert_close(self.state(net), before, rtol=0, atol=0)

    def test_batch_norm_as_it_is_in_eval_is_part_of_the_model(self):
        net, x = self.network(), numbers(3, 1, 3, 3)
        K = KFAC.from_module(net, "categorical", x, parameters=["0", "4"])
        for layer in ("0", "4"):
            S, A = definition(net, layer, x, "categorical", "expand")
            close(list(K.factors[layer]), [S, A])

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_where_gradients_are_switched_off(self, mode):
        net, x = mlp(3, 4, 2), numbers(4, 3)
        outside = KFAC.from_module(net, "categorical", x).to_dense()
        with mode():
            assert torch.equal(KFAC.from_module(net, "categorical", x).to_dense(), outside)

    def test_factors_have_no_history(self):
        K = KFAC.from_module(mlp(3, 4, 2), "categorical", numbers(4, 3).requires_grad_())
        assert not any(t.requires_grad for t in K.tensors)


class TestInsideTransforms:
    """The factors are constants, and can be made where anything is differentiated or mapped."""

    net = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.arange(8.0, dtype=torch.float64)

    def product(self, damping: Tensor, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return KFAC.from_module(self.net, "gaussian", x, damping=damping) @ self.v

    def test_the_damping_is_differentiated_or_mapped(self):
        dampings = torch.tensor([0.1, 0.5], dtype=torch.float64)
        K = KFAC.from_module(self.net, "gaussian", self.x)
        rows = [KFAC(K.factors, K.domain, c) @ self.v for c in dampings]
        close(torch.func.vmap(self.product)(dampings), torch.stack(rows))

        def total(c):
            return self.product(c).square().sum()

        def outside(c):
            return (KFAC(K.factors, K.domain, c) @ self.v).square().sum()

        for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
            close(transform(total)(dampings[0]), transform(outside)(dampings[0]))

    def test_inputs_are_constants(self):
        gradient = torch.func.grad(lambda x: self.product(torch.tensor(0.1).double(), x).sum())
        assert not gradient(self.x).any()

    def test_mapped_batches_are_refused(self):
        with pytest.raises(ValueError, match=r"torch\.func\.vmap maps over inputs"):
            torch.func.vmap(lambda x: self.product(torch.tensor(0.1).double(), x))(self.x[None])


class TestRefused:
    def test_modules(self):
        x = numbers(4, 3)
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            KFAC.from_module(lambda x: x, "categorical", x)
        norm = seeded(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
        with pytest.raises(ValueError, match=r"'1\.weight' is in LayerNorm '1'.*\['0', '2'\]"):
            KFAC.from_module(norm, "categorical", x)
        assert KFAC.from_module(norm, "categorical", x, parameters=["0", "2"]).shape == (20, 20)
        tied = mlp(3, 3, 3)
        tied[2].weight = tied[0].weight
        with pytest.raises(ValueError, match=r"'0\.weight' and '2\.weight' are one parameter"):
            KFAC.from_module(tied, "categorical", x)
        frozen = mlp(3, 2).requires_grad_(False)
        with pytest.raises(ValueError, match="requires gradients"):
            KFAC.from_module(frozen, "categorical", x)
        K = KFAC.from_module(frozen, "categorical", x, parameters=["0"])
        assert K.shape == (8, 8)

    @pytest.mark.parametrize("part", [nn.BatchNorm1d(3), nn.Dropout(0.5)], ids=repr)
    def test_training_mode(self, part):
        net = seeded(nn.Sequential(nn.Linear(3, 3), part, nn.Linear(3, 2))).train()
        with pytest.raises(ValueError, match=rf"1 is a {type(part).__name__}.*eval\(\)"):
            KFAC.from_module(net, "categorical", numbers(4, 3), parameters=["0", "2"])

    def test_settings(self):
        net, x = mlp(3, 2), numbers(4, 3)

        def refused(message: str, **options: Any) -> None:
            with pytest.raises(ValueError, match=message):
                KFAC.from_module(net, options.pop("likelihood", "categorical"), x, **options)

        refused("fisher='true'", fisher="true")
        refused("weight_sharing='none'", weight_sharing="none")
        refused("mc_samples=0", fisher="mc", mc_samples=0)
        refused("mc_samples=2", mc_samples=2)
        refused("likelihood='poisson'", likelihood="poisson")
        refused("damping=-1", damping=-1.0)
        refused("damping_style='both'", damping_style="both")
        refused(r"'7', which is neither.*'0\.weight'", parameters=["7"])
        refused("parameters is empty", parameters=[])
        refused("needs targets", fisher="empirical")
        with pytest.raises(TypeError, match="list of names"):
            KFAC.from_module(net, "categorical", x, parameters="0")

    def test_batches(self):
        net = mlp(3, 2)
        with pytest.raises(ValueError, match="N samples first"):
            KFAC.from_module(net, "categorical", numbers(0, 3))
        with pytest.raises(ValueError, match="not finite"):
            KFAC.from_module(net, "categorical", numbers(2, 3) / 0)
        with pytest.raises(ValueError, match="classes 0 to 1"):
            KFAC.from_module(
                net, "categorical", numbers(2, 3), torch.tensor([0, 2]), fisher="empirical"
            )

    def test_forward_passes(self):
        class Odd(nn.Module):
            def __init__(self, forward: Callable[[nn.Module, Tensor], Any]) -> None:
                super().__init__()
                self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)
                self.run = forward

            def forward(self, x: Tensor) -> Any:
                return self.run(self, x)

        def refused(message: str, forward: Callable[[Any, Tensor], Any], error: Any) -> None:
            with pytest.raises(error, match=message):
                KFAC.from_module(seeded(Odd(forward)), Categorical(), numbers(4, 3))

        def silent(net: Any, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = net.used(x)
            return net.spare(z)

        refused("'spare' is not called", lambda net, x: net.used(x), ValueError)
        refused("'used' is called more than once", lambda net, x: net.used(net.used(x)), ValueError)
        refused("returned a tuple", lambda net, x: (net.used(net.spare(x)),), TypeError)
        refused(
            "'spare' got inputs of length 3 on the first axis, but there are 4 samples",
            lambda net, x: net.used(net.spare(x[:3]).sum(0).expand(4, 3)),
            ValueError,
        )
        refused("'used' has no gradient", silent, ValueError)

    def test_a_layer_without_effect_has_no_scores(self):
        class Idle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                self.idle(x)
                return self.used(x)

        K = KFAC.from_module(seeded(Idle()), "categorical", numbers(4, 3), damping=0.1)
        close(K.factors["idle"].S, torch.zeros(3, 3, dtype=FLOAT64))
        v = numbers(K.shape[0])
        close(K.inverse() @ (K @ v), v, rtol=1e-9, atol=1e-10)

    def test_factors(self):
        factors = some_factors()
        S, A = factors["a"]

        def refused(message: str, a: Any, error: Any = ValueError) -> None:
            with pytest.raises(error, match=message):
                KFAC({**factors, "a": a}, SPACE)

        refused(r"S of layer 'a' has shape \(3, 2\)", (S[:, :2], A))
        refused(r"3 x 2 parameters.*weight \(3, 2\) and bias \(3,\)", (S, A[:2, :2]))
        refused("2 x 3 parameters", (S[:2, :2], A))
        refused("as many groups", (S[None], A))
        refused("A of layer 'a' is not symmetric", (S, A + torch.ones(3, 3).triu(1)))
        refused("S of layer 'a' is not symmetric, or not finite", (S * math.nan, A))
        refused("S of layer 'a' is torch.float32", (S.float(), A), TypeError)
        refused("S of layer 'a' is a list", (S.tolist(), A), TypeError)
        with pytest.raises(ValueError, match=r"\['d\.bias'\], for which there are no factors"):
            KFAC({name: pair for name, pair in factors.items() if name != "d"}, SPACE)
        with pytest.raises(ValueError, match="weight None and bias None"):
            KFAC({**factors, "e": (S, A)}, SPACE)
        with pytest.raises(TypeError, match="dictionary of named parameters"):
            KFAC(factors, Space.flat(SPACE.size, FLOAT64))
        for damping in (-1.0, math.nan, torch.ones(2)):
            with pytest.raises(ValueError, match="one number >= 0"):
                KFAC(factors, SPACE, damping)
