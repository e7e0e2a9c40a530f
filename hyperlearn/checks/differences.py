"""Central differences over a sweep of step sizes: a slope, its uncertainty, or no slope at all.

slope = (rho^2 D(h / rho) - D(h)) / (rho^2 - 1),   D(h) = (phi(h) - phi(-h)) / 2h
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Half decades from 1e-1 to 1e-11: a window of three quotients then spans one decade.
STEPS = tuple(10.0 ** (-k / 2) for k in range(2, 23))
# How many standard deviations of the noise are allowed for.
SAFETY = 4.0


@dataclass(frozen=True)
class Plateau:
    """Three neighbouring quotients of a sweep, and what they say together.

    Parameters
    ----------
    slope
        Richardson's extrapolation of the two larger steps.
    uncertainty
        How far it may be from the derivative: truncation and noise.
    step
        The middle one of the three.
    bend
        ``|phi(h) - 2 phi(0) + phi(-h)| / h`` at the smallest of the three steps: the difference of
        the one-sided slopes. Where phi is smooth it is proportional to h.
    kinked
        Whether the bend is as large at the smallest step as at the largest; None where noise hides
        it.
    """

    slope: float
    uncertainty: float
    step: float
    bend: float
    kinked: bool | None

    def contains(self, slope: float) -> bool:
        """Whether a slope is within the uncertainty."""
        return abs(slope - self.slope) <= self.uncertainty

    def excludes(self, other: Plateau) -> bool:
        """Whether no slope is within both uncertainties."""
        return abs(other.slope - self.slope) > self.uncertainty + other.uncertainty


@dataclass(frozen=True)
class Sweep:
    """What a sweep of step sizes found about ``phi'(0)``.

    Parameters
    ----------
    best
        The plateau of least uncertainty; None where phi is not finite around 0.
    plateaus
        Of every three neighbouring steps, largest first.
    flat
        Whether phi had the same value at every point of the sweep.
    """

    best: Plateau | None
    plateaus: tuple[Plateau, ...]
    flat: bool

    def rival(self, slope: float) -> Plateau | None:
        """A plateau at larger steps that contains `slope` and excludes the best one.

        Every plateau of a smooth function contains its derivative. Where there is a rival, the
        values are smooth on neither scale: they jump in between (an inner solver that stops at a
        loose tolerance, single precision inside), or there is a kink close by.
        """
        if self.best is None:
            return None
        for plateau in self.plateaus:
            if (
                plateau.step > self.best.step
                and plateau.contains(slope)
                and plateau.excludes(self.best)
            ):
                return plateau
        return None


def value_noise(phi: Callable[[float], float], epsilon: float) -> float:
    r"""Standard deviation of the noise in phi's values near 0, at least rounding's.

    k-th differences at spacing s annihilate polynomials of degree < k: of a smooth function they
    leave ``s^k phi^(k)``, which is nothing for the spacing ``sqrt(epsilon)`` and k >= 3, and of
    independent errors of variance v they have variance ``v (2k)! / (k!)^2``. The largest estimate
    over k = 3, ..., 6 is taken. Where that is zero (the values may all be rounded to one number)
    rounding itself is left, ``epsilon |phi(0)|``.

    Costs 13 values. Source: Hamming's difference table as in Moré and Wild (2011), "Estimating
    computational noise", doi:10.1137/100786125, section 3.

    Parameters
    ----------
    phi
        A function of a number.
    epsilon
        Unit roundoff of what it is computed in.

    Examples
    --------
    >>> import random
    >>> rng = random.Random(0)
    >>> noise = value_noise(lambda t: math.exp(t) + rng.gauss(0, 1e-6), 2.2e-16)
    >>> 0.3e-6 < noise < 3e-6
    True
    """
    spacing = math.sqrt(epsilon)
    values = [phi(j * spacing) for j in range(-6, 7)]
    noise = epsilon * abs(values[6])
    table = values
    for k in range(1, 7):
        table = [right - left for left, right in pairwise(table)]
        if k >= 3:
            variance = sum(entry**2 for entry in table) / len(table) / math.comb(2 * k, k)
            if math.isfinite(variance):
                noise = max(noise, math.sqrt(variance))
    return noise


def sweep(
    phi: Callable[[float], float],
    noise: float,
    epsilon: float,
    steps: Sequence[float] = STEPS,
) -> Sweep:
    r"""Find where central differences of phi at 0 agree from one step size to the next.

    The quotient ``D(h) = phi'(0) + c h^2 + O(h^4) + noise / h`` is spoiled by truncation at large
    steps and by noise at small ones; in between there is a plateau. Two neighbours give
    ``R = D(h/rho) + (D(h/rho) - D(h)) / (rho^2 - 1)``, free of the ``h^2``. Its uncertainty is
    taken from a third, which has seen neither:

        2 max(|R - D(h/rho)|, |R - D(h/rho^2)|) + 4 (noise + epsilon |R|) / (h/rho) .

    The first term bounds what truncation is left and shows noise that was not announced, for three
    quotients agree by chance more rarely than two; the second is for noise that was, and for the
    rounding of the point itself. The plateau is where the sum is least. Smaller steps are not tried
    once the second term alone is larger than the least sum so far.

    A kink at 0 has a plateau too, the mean of the two slopes. It shows in the bend, which does not
    vanish with h. Where it does in the end, the kink was only apparent, and the plateau is sought
    among the smaller steps.

    Costs 2 values a step, about 20 in double precision. Source: Richardson's extrapolation with the
    tableau's own error estimate as in Ridders (1982), doi:10.1016/S0141-1195(82)80057-0, and the
    noise term of Moré and Wild (2012), doi:10.1145/2168773.2168777.

    Parameters
    ----------
    phi
        A function of a number; not finite where it is not defined.
    noise
        Standard deviation of the errors of its values, see `value_noise`.
    epsilon
        Unit roundoff of what it is computed in.
    steps
        Decreasing.

    Examples
    --------
    >>> found = sweep(math.exp, noise=2e-16, epsilon=2.2e-16)
    >>> abs(found.best.slope - 1) < found.best.uncertainty < 1e-9
    True
    """
    middle = phi(0.0)
    taken: list[float] = []
    quotients: list[float] = []
    bends: list[float] = []
    plateaus: list[Plateau] = []
    flat = True
    for h in (step for step in steps if step >= 100 * epsilon):
        ahead, behind = phi(h), phi(-h)
        flat = flat and ahead == middle == behind
        taken.append(h)
        quotients.append((ahead - behind) / (2 * h))
        bends.append(abs((ahead - middle) - (middle - behind)) / h)
        if len(taken) < 3:
            continue
        (h0, h1, h2), (d0, d1, d2) = taken[-3:], quotients[-3:]
        slope = d1 + (d1 - d0) / ((h0 / h1) ** 2 - 1)
        rounding = SAFETY * (noise + epsilon * abs(slope)) / h1
        spread = 2 * max(abs(slope - d1), abs(slope - d2))
        if math.isfinite(spread):
            # Of three errors; the middle value counts twice.
            hidden = bends[-1] <= SAFETY * 2 * noise / h2
            # A bend that is proportional to h is down by h2 / h0, about a tenth.
            kinked = None if hidden else bends[-1] > 0.5 * bends[-3]
            plateaus.append(Plateau(slope, spread + rounding, h1, bends[-1], kinked))
        if (
            plateaus
            and not plateaus[-1].kinked
            and rounding > min(each.uncertainty for each in plateaus)
        ):
            break
    return Sweep(_least_uncertain(plateaus), tuple(plateaus), flat)


def _least_uncertain(plateaus: Sequence[Plateau]) -> Plateau | None:
    last_kink = max((i for i, each in enumerate(plateaus) if each.kinked), default=-1)
    smooth = plateaus[last_kink + 1 :]
    if any(each.kinked is False for each in smooth):
        plateaus = smooth
    return min(plateaus, key=lambda each: each.uncertainty, default=None)
