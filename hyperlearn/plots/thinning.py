"""Long curves as short ones that look the same: of each pixel column what can be seen of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Columns of a panel; a printer has more dots than a screen.
COLUMNS = 1500


def kept(
    x: NDArray[np.floating], *curves: NDArray[np.floating], columns: int = COLUMNS
) -> NDArray[np.int64]:
    """Which points to keep: the first, the last, the lowest and the highest of each column.

    Lines through them cover the pixels that lines through all points cover: the M4 aggregation of
    Jugel et al. (2014), doi:10.14778/2732951.2732953. In every column one gap (NaN) is kept too.

    Parameters
    ----------
    x
        ``(n,)``, ascending and finite.
    *curves
        ``(n,)`` each; what is kept of one is kept of all.
    columns
        How many of equal width the range of x is cut into.

    Returns
    -------
    NDArray
        Ascending indices, at most ``columns (2 + 3 curves)`` of them; all if there are few.

    Examples
    --------
    >>> x = np.arange(1e6)
    >>> y = np.zeros(1_000_000)
    >>> y[123_456] = 1  # a spike
    >>> points = kept(x, y)
    >>> len(points) < 5000, 123_456 in points
    (True, True)
    """
    if len(x) <= columns * (2 + 3 * len(curves)):
        return np.arange(len(x))
    edges = np.linspace(x[0], x[-1], columns + 1)[1:-1]
    bounds = [0, *np.searchsorted(x, edges).tolist(), len(x)]
    chosen: set[int] = set()
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        chosen |= {start, stop - 1}
        for curve in curves:
            part = curve[start:stop]
            gaps = np.isnan(part)
            if gaps.any():
                chosen.add(start + int(gaps.argmax()))
                lowest, highest = np.where(gaps, np.inf, part), np.where(gaps, -np.inf, part)
            else:
                lowest = highest = part
            chosen |= {start + int(lowest.argmin()), start + int(highest.argmax())}
    return np.array(sorted(chosen))
