"""Which colour a value has: scales for what has a sign, and for what has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The first is uniform in lightness; the second, from blue to red, on either side of its white.
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"


@dataclass(frozen=True)
class Colours:
    """A scale from the lowest to the highest value, symmetric about 0 if they change sign.

    Examples
    --------
    >>> Colours.of(np.array([-1.0, 3.0, np.nan]))
    Colours(low=-3.0, high=3.0, map='RdBu_r')
    """

    low: float
    high: float
    map: str

    @classmethod
    def of(cls, *values: NDArray[Any]) -> Colours:
        """One scale for several pictures; what is not finite does not count."""
        finite = np.concatenate([v[np.isfinite(v)] for v in values])
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if low < 0 < high:
            return cls(-max(-low, high), max(-low, high), DIVERGING)
        if low == high:  # a scale of no length
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        return cls(low, high, SEQUENTIAL)

    @property
    def options(self) -> dict[str, Any]:
        """For what matplotlib colours itself."""
        return {"vmin": self.low, "vmax": self.high, "cmap": self.map}
