"""The sweep of central differences against derivatives in closed form."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperlearn.checks.differences import STEPS, Sweep, sweep, value_noise

EPSILON = 2.0**-52
Phi = Callable[[float], float]


def swept(phi: Phi) -> Sweep:
    return sweep(phi, value_noise(phi, EPSILON), EPSILON)


SMOOTH: dict[str, tuple[Phi, float, float]] = {
    # function, its derivative at 0, relative uncertainty to reach
    "exp": (math.exp, 1.0, 1e-9),
    "steep exponential": (lambda t: math.exp(50 * t), 50.0, 1e-8),
    "fast oscillation": (lambda t: math.sin(1000 * t + 0.3), 1000 * math.cos(0.3), 1e-7),
    "pole nearby": (lambda t: 1 / (0.05 - t), 400.0, 1e-8),
    "edge of the domain": (
        lambda t: math.log(0.01 + t) if t > -0.01 else math.nan,
        100.0,
        1e-7,
    ),
    "small slope on a large value": (lambda t: 1e6 + math.exp(t), 1.0, 1e-5),
    "sharp transition": (lambda t: math.log1p(math.exp(1e3 * t)) / 1e3, 0.5, 1e-8),
    "quadratic": (lambda t: (1 + t) ** 2, 2.0, 1e-12),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth(name):
    phi, slope, uncertainty = SMOOTH[name]
    found = swept(phi).best
    assert abs(found.slope - slope) <= found.uncertainty <= uncertainty * abs(slope)
    assert found.kinked is not True


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(-9, -2))
def test_uncertainty_holds_under_noise(seed, exponent):
    """Whatever the noise, the derivative is within the uncertainty, on no other plateau."""
    draws, noise = random.Random(seed), 10**exponent
    found = swept(lambda t: math.exp(t) + draws.gauss(0, noise))
    assert found.best.contains(1.0)
    assert found.best.uncertainty >= noise
    assert found.rival(1.0) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(-14, -1), st.integers(0, 10**6))
def test_noise_level(exponent, seed):
    draws, noise = random.Random(seed), 10**exponent
    found = value_noise(lambda t: math.exp(t) + draws.gauss(0, noise), EPSILON)
    assert noise / 5 <= found <= 5 * noise


def test_smooth_function_has_the_noise_of_rounding():
    assert value_noise(math.exp, EPSILON) <= 4 * EPSILON
    assert value_noise(lambda t: 1e8, EPSILON) == pytest.approx(1e8 * EPSILON)


@pytest.mark.parametrize("left", [0.0, -1.0, 0.5])
def test_kink(left):
    found = swept(lambda t: t if t > 0 else left * t)
    assert found.best.kinked
    assert found.best.slope == pytest.approx((1 + left) / 2)
    assert found.best.bend == pytest.approx(1 - left)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_kink_nearby(distance):
    """Smaller steps do not see it; a slope of the larger ones is a rival, and any other is not."""
    found = swept(lambda t: t + max(t - distance, 0.0))
    assert found.best.contains(1.0)
    assert found.best.uncertainty < 1e-5
    assert found.best.kinked is not True
    if distance < 1e-3:  # or no three of the larger steps agree
        assert found.rival(1.5) is not None
    assert found.rival(3.0) is None


def test_values_rounded_to_single_precision():
    """Constant for small steps: the slope of large ones is no error, but a rival."""

    def phi(t: float) -> float:
        return float(np.float32(1 + t)) ** 2

    found = swept(phi)
    assert found.best.contains(2.0) or found.rival(2.0) is not None


def test_steps_too_small_for_the_precision_are_not_taken():
    seen = []

    def phi(t: float) -> float:
        seen.append(abs(t))
        return t

    sweep(phi, 0.0, 1.2e-7)
    assert min(t for t in seen if t) >= 100 * 1.2e-7
    assert max(seen) == STEPS[0]


def test_nothing_finite():
    found = sweep(lambda t: 1.0 if t == 0 else math.nan, 0.0, EPSILON)
    assert found.best is None
    assert found.rival(0.0) is None


def test_flat():
    assert swept(lambda t: 3.0).flat
    assert not swept(lambda t: 3.0 + t).flat
