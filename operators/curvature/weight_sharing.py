"""Linear and Conv2d as one thing: a matrix that is used at many positions of a sample.

At position r of sample n a layer computes ``z_nr = W abar_nr`` with ``abar = (a, 1)``: the bias is
the last column of W. A Linear layer has the positions of its extra axes (time, say), a convolution
those of its output, where ``a_nr`` is the patch under the kernel. What is done about them
(Eschenhagen et al., 2023, arXiv:2311.00636, sections 3.2 and 3.3):

    expand     A = mean_nr abar abar^T             S = mean_n sum_r s s^T
    reduce     A = mean_n abar_n abar_n^T          S = mean_n s_n s_n^T

with ``abar_n = mean_r abar_nr`` and ``s_n = sum_r s_nr``. For convolutions, expand is the
approximation of Grosse and Martens (2016, arXiv:1602.01073, eqs. 28 and 29), up to the factor that
they have in A and here is in S. The groups of a convolution are layers of their own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

WeightSharing = Literal["expand", "reduce"]
Layer = nn.Linear | nn.Conv2d


def groups(layer: Layer) -> tuple[int, ...]:
    """Leading axes of the factors of a layer: ``(G,)`` for G > 1 groups, else none."""
    return (layer.groups,) if isinstance(layer, nn.Conv2d) and layer.groups > 1 else ()


def identity(layer: Layer) -> Tensor:
    """``I`` of the shape of S: ``(p, p)``, or ``(G, p, p)``."""
    leading, weight = groups(layer), layer.weight
    p = weight.shape[0] // (leading[0] if leading else 1)
    eye = torch.eye(p, dtype=weight.dtype, device=weight.device)
    return eye.repeat(*leading, 1, 1) if leading else eye


def input_moment(layer: Layer, x: Tensor, *, weight: bool, bias: bool, reduce: bool) -> Tensor:
    """A: ``(d, d)``, or ``(G, d, d)``, for the inputs x of a layer.

    Parameters
    ----------
    layer, x
        The layer, and what it was called with: ``(N, ..., a)``, or ``(N, c, h, w)``.
    weight, bias
        Which of its parameters are included.
    reduce
        Whether positions are reduced; else they are expanded.
    """
    dtype, leading = layer.weight.dtype, groups(layer)
    one = torch.ones(*leading, 1, 1, dtype=dtype, device=x.device)
    if not weight:
        return one
    columns = _input_columns(layer, x.to(dtype), reduce)
    if not bias:
        return columns @ columns.mT / columns.shape[-1]
    # The row of ones that belongs to the bias is not copied together with the columns, nor the
    # product next to it: both are written where they belong.
    d, count = columns.shape[-2:]
    A = columns.new_empty(*leading, d + 1, d + 1)
    torch.matmul(columns, columns.mT, out=A[..., :d, :d]).div_(count)
    mean = columns.mean(-1)
    A[..., :d, d], A[..., d, :d], A[..., d, d] = mean, mean, 1.0
    return A


def score_moment(layer: Layer, score: Tensor, *, reduce: bool) -> Tensor:
    """``sum_nr s s^T`` (expand) or ``sum_n s_n s_n^T`` (reduce), of the shape of S.

    Parameters
    ----------
    layer, score
        The layer, and the scores at its output: of the shape of the output.
    reduce
        Whether positions are reduced.
    """
    score = score.to(layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        if reduce and score.ndim > 2:
            score = score.flatten(1, -2).sum(1)
        rows = score.reshape(-1, score.shape[-1])
        return rows.T @ rows
    leading = groups(layer)
    p = score.shape[1] // layer.groups
    s = score.reshape(score.shape[0], *leading, p, -1)
    if reduce:
        s = s.sum(-1, keepdim=True)
    if s.shape[-1] > p:
        # Many positions: the products of single samples are smaller than a copy of s is.
        return (s @ s.mT).sum(0)
    s = s.movedim(0, -2).reshape(*leading, p, -1)
    return s @ s.mT


def _input_columns(layer: Layer, x: Tensor, reduce: bool) -> Tensor:
    """``(d, M)``, or ``(G, d, M)``: a column for each position, or each sample."""
    if isinstance(layer, nn.Linear):
        if reduce and x.ndim > 2:
            x = x.flatten(1, -2).mean(1)
        return x.reshape(-1, x.shape[-1]).T
    patches = _patches(layer, x)
    depth = patches.shape[:3].numel() // layer.groups
    if reduce:
        patches = patches.mean((-2, -1))
    return patches.reshape(*groups(layer), depth, -1)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """View ``(c, kh, kw, N, h, w)``: what the kernel meets at each position of the output.

    One copy of it makes a matrix of columns whose rows lie in memory as a product wants them.
    """
    (kh, kw), (dh, dw), (sh, sw) = layer.kernel_size, layer.dilation, layer.stride
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, _padding(layer), mode)
    count, channels, height, width = x.shape
    rows, columns = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    sample, channel, row, column = x.stride()
    return x.as_strided(
        (channels, kh, kw, count, rows, columns),
        (channel, dh * row, dw * column, sample, sh * row, sw * column),
    )


def _padding(layer: nn.Conv2d) -> list[int]:
    """Left, right, top, bottom; of an odd total, ``"same"`` puts the larger half behind."""
    sides: list[int] = []
    for axis in (1, 0):
        if isinstance(layer.padding, str):
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            total = reach if layer.padding == "same" else 0
            sides += [total // 2, total - total // 2]
        else:
            sides += [int(layer.padding[axis])] * 2
    return sides
