"""Points in a box: uniform inside, uniform on the boundary, and grids; all float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Box = Sequence[tuple[float, float]]
"""One interval ``(lower, upper)`` a coordinate."""

UNIT_SQUARE: Box = ((0.0, 1.0), (0.0, 1.0))


def uniform_interior(n: int, box: Box, generator: torch.Generator) -> Tensor:
    """Independent uniform points of the box, ``(n, d)``.

    Raises
    ------
    ValueError
        n is negative, or an interval is empty.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> uniform_interior(3, UNIT_SQUARE, generator).shape
    torch.Size([3, 2])
    """
    lower, upper = _corners(box)
    if n < 0:
        raise ValueError(f"n={n}; expected at least 0")
    draw = torch.rand(n, len(lower), dtype=torch.float64, generator=generator)
    return lower + (upper - lower) * draw


def uniform_face(n: int, box: Box, generator: torch.Generator, *, axis: int, upper: bool) -> Tensor:
    """Independent uniform points of one face of the box, ``(n, d)``.

    Parameters
    ----------
    n
        Number of points.
    box
        One interval a coordinate.
    generator
        Of the draw.
    axis
        The coordinate that is constant on the face; 0 is time where there is time.
    upper
        Whether it has its upper value there; ``axis=0, upper=False`` is the initial time.

    Raises
    ------
    ValueError
        n is negative, an interval is empty, or there is no such coordinate.
    """
    if not 0 <= axis < len(box):
        raise ValueError(f"axis={axis}; the box has {len(box)} coordinates")
    points = uniform_interior(n, box, generator)
    points[:, axis] = box[axis][int(upper)]  # the end itself: no rounding
    return points


def uniform_boundary(n: int, box: Box, generator: torch.Generator) -> Tensor:
    """Uniform points of the boundary, as many on each of the 2 d faces, ``(n, d)``.

    For a square ``n / 4`` a side. The rows go face by face: lower and upper face of the first
    coordinate, then of the next; what is left of ``n / (2 d)`` goes to the first faces. Faces of
    unequal area get equal numbers all the same.

    Raises
    ------
    ValueError
        n is negative, or an interval is empty.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> points = uniform_boundary(8, UNIT_SQUARE, generator)
    >>> points[:4, 0]
    tensor([0., 0., 1., 1.], dtype=torch.float64)
    """
    faces = 2 * len(box)
    each, left = divmod(n, faces)
    return torch.cat(
        [
            uniform_face(each + (face < left), box, generator, axis=face // 2, upper=bool(face % 2))
            for face in range(faces)
        ]
    )


def grid(n_per_side: int, box: Box, *, interior_only: bool = False) -> Tensor:
    """The tensor grid of ``n_per_side^d`` points, the last coordinate running fastest.

    Parameters
    ----------
    n_per_side
        Points along each coordinate; at least 2 where the ends belong to the grid.
    box
        One interval a coordinate.
    interior_only
        Leave the boundary out: the points ``k / (n_per_side + 1)``, k = 1 .. n_per_side, instead
        of ``k / (n_per_side - 1)``, k = 0 .. n_per_side - 1, of each interval.

    Returns
    -------
    Tensor
        ``(n_per_side^d, d)``.

    Raises
    ------
    ValueError
        Too few points, or an empty interval.

    Examples
    --------
    >>> grid(2, UNIT_SQUARE).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    >>> grid(1, UNIT_SQUARE, interior_only=True).tolist()
    [[0.5, 0.5]]
    """
    if n_per_side < (1 if interior_only else 2):
        raise ValueError(f"n_per_side={n_per_side}; expected at least {2 - interior_only}")
    _corners(box)
    inner = slice(1, -1) if interior_only else slice(None)
    size = n_per_side + 2 * interior_only
    axes = [torch.linspace(*ends, size, dtype=torch.float64)[inner] for ends in box]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes))


def coordinates(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two columns of points ``(..., 2)``.

    Raises
    ------
    TypeError
        The points are not floating-point numbers.
    ValueError
        The last dimension is not 2.
    """
    if not x.is_floating_point():
        raise TypeError(f"points of dtype {x.dtype}; expected a floating dtype")
    if x.ndim == 0 or x.shape[-1] != 2:
        raise ValueError(f"points of shape {tuple(x.shape)}; expected (..., 2)")
    return x[..., 0], x[..., 1]


def in_slabs(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """``function(x_1, x_2)`` of points ``(..., 2)``, a number of points at a time.

    Parameters
    ----------
    function
        From two columns ``(n,)`` to ``(n, ...)``, row by row.
    x
        Points.
    rows
        The largest n: what bounds the memory of tables that `function` makes.

    Returns
    -------
    Tensor
        The dimensions of the points, then those of a value.

    Raises
    ------
    TypeError, ValueError
        As `coordinates`.
    """
    first, second = coordinates(x)
    slabs = zip(first.reshape(-1).split(rows), second.reshape(-1).split(rows), strict=True)
    value = torch.cat([function(a, b) for a, b in slabs])
    return value.reshape(first.shape + value.shape[1:])


def _corners(box: Box) -> tuple[Tensor, Tensor]:
    for lower, upper in box:
        if not lower < upper:
            raise ValueError(f"the interval ({lower}, {upper}) of the box is empty")
    corners = torch.tensor(list(box), dtype=torch.float64).reshape(-1, 2)
    return corners[:, 0], corners[:, 1]
