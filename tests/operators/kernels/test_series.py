"""Taylor arithmetic against nested ``torch.func.grad``, to the fourth order."""

from __future__ import annotations

import pytest
import torch

from operators.kernels.series import Series, derivatives
from tests.operators.kernels.families import close, float64


def nested(f, s, order=4):
    found = [f(s)]
    for _ in range(order):
        f = torch.func.grad(lambda t, g=f: g(t).sum())
        found.append(f(s))
    return found


C = torch.tensor(0.7, dtype=float64)
V = torch.tensor([[0.3, 1.2, 0.9]], dtype=float64)
RULES = {
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "neg": torch.neg,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "methods": lambda s: s.exp() + s.log() * s.sqrt() - s.sin() / s.cos().square() + s.neg().tanh(),
    "more methods": lambda s: s.sigmoid() * s.rsqrt() + s.reciprocal() + s.pow(3) + s.add(1).mul(s),
    "functions of two": lambda s: torch.add(1.5, torch.mul(s, s)) - torch.div(2.0, s),
    "functions of two, other way": lambda s: torch.sub(torch.div(s, C), C) + torch.mul(C, s),
    "sub": lambda s: torch.sub(s, s.exp()) + torch.sub(C, s),
    "pow of a number": lambda s: torch.pow(1.7, s) + 2**s + 2.5**s,
    "pow of a tensor": lambda s: torch.pow(C, s) + C**s,
    "pow": lambda s: torch.pow(s, 2.5) + s**-1 + s**-2.3 + s**4 + s**7 + s**C,
    "power of itself": lambda s: s**s,
    "low powers": lambda s: s**0 + s**1 + s**2 + s**3 + s**1.0 + s**2.0,
    "numbers": lambda s: (1 + s) * 2 - (3 - s) / 4 + 5 / (s + 6) - (s - 7) * (-s) + 0.5 * s,
    "tensors": lambda s: (C + s) * C - (V - s) / C + C / (s + V) - (s - V) * (-s) + V * s,
    "polynomial": lambda s: s**3 - 2 * s**2 + s - 1,
    "constant": lambda s: 0 * s + 3.0,
    "composite": lambda s: ((1 + s.square()).log() * (-s).exp()).sqrt() / (2 + s.sin()),
    "many": lambda s: torch.tanh(torch.exp(-s) + torch.cos(s * s)) ** 3,
    # Without a rule.
    "erf": lambda s: torch.erf(s) + s,
    "alpha": lambda s: torch.add(s, s.exp(), alpha=2.0),
    "where": lambda s: torch.where(s > 1, s.exp(), s.sin()),
    "abs": lambda s: abs(s) ** 3,
    "comparison": lambda s: (s == 1.5) * s + (s != 1.5) * s**2 + (s < 9) * s,
    "shape": lambda s: s.exp() * torch.ones(s.shape, dtype=s.dtype),
    "index": lambda s: torch.cat([s[:1].exp(), s[1:].sin()]),
    "positive": lambda s: +s.exp(),
}


@pytest.mark.parametrize("name", list(RULES))
def test_is_nested_reverse_mode(name):
    s = torch.tensor([[0.3, 0.8, 1.7], [2.4, 0.05, 1.1]], dtype=float64)
    f = RULES[name]
    for order in (0, 1, 2, 3, 4):
        found, expected = derivatives(f, s, order), nested(f, s, order)
        assert len(found) == order + 1
        for a, b in zip(found, expected, strict=True):
            assert a.shape == s.shape
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "exp", "sin", "square"])
def test_large_arguments(name):
    s = torch.tensor([-3000.0, -40.0, 0.0, 40.0, 700.0, 3000.0], dtype=float64)
    s = s[:-1] if name == "exp" else s
    for a, b in zip(derivatives(RULES[name], s, 4), nested(RULES[name], s), strict=True):
        assert bool(torch.isfinite(b).all())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_whole_powers_at_zero():
    """Where the points of a pair coincide: no division by zero."""
    s = torch.zeros(1, dtype=float64)
    for p in range(9):
        for exponent in (p, float(p)):
            expected = [0.0] * 5
            if p < 5:
                expected[p] = torch.tensor(1.0).new_tensor([1, 1, 2, 6, 24][p]).item()
            found = derivatives(lambda t, q=exponent: t**q, s, 4)
            assert [c.item() for c in found] == expected


def test_functions_that_return_numbers():
    s = torch.ones(2, 2, dtype=float64)
    found = derivatives(lambda t: 3.0, s, 2)
    assert [c.tolist() for c in found] == [[[v, v], [v, v]] for v in (3.0, 0.0, 0.0)]


def test_is_differentiable():
    s = torch.tensor([0.3, 0.8, 1.7], dtype=float64)

    def f(a):
        return sum(c.sum() for c in derivatives(lambda t: torch.exp(-a * t) / (1 + a * t**2), s, 4))

    a = torch.tensor(0.6, dtype=float64)
    difference = (f(a + 1e-5) - f(a - 1e-5)) / 2e-5
    assert float(torch.func.grad(f)(a)) == pytest.approx(float(difference), rel=1e-8)
    assert torch.autograd.gradcheck(f, a.clone().requires_grad_())


def test_single_precision_stays():
    for name in ("many", "erf", "numbers"):
        assert all(c.dtype == torch.float32 for c in derivatives(RULES[name], torch.ones(2), 4))


@pytest.mark.parametrize(
    "f",
    [
        lambda s: torch.erf(s).sum(),
        lambda s: s * torch.ones(2, 1, dtype=float64),
        lambda s: torch.ones(2, dtype=float64),
        lambda s: "a",
        lambda s: torch.erf(s) * torch.ones(2, 1),
    ],
)
def test_functions_act_elementwise(f):
    with pytest.raises(ValueError, match=r"a profile of s \(3,\) returned .*; expected the same"):
        derivatives(f, torch.ones(3, dtype=float64), 2)


def test_errors_of_the_function_are_its_own():
    def f(s):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        derivatives(f, torch.ones(3), 2)
    with pytest.raises(AttributeError, match="no_such_method"):
        derivatives(lambda s: s.no_such_method(), torch.ones(3), 2)


def test_products_of_series_are_truncated():
    one = torch.ones((), dtype=float64)
    a = Series([one, 2 * one, 3 * one], 2)
    close(torch.stack((a * a).terms), torch.tensor([1.0, 4.0, 10.0], dtype=float64))
    close(torch.stack((a + 1).terms), torch.tensor([2.0, 2.0, 3.0], dtype=float64))
