"""What the entries of a convolution, and of its derivatives, depend on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as every
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from operators.coloured.operands import Operands
from operators.coloured.reach import Reach, broadcast, everywhere, through, united


def windows(op: Operands, fine: Sequence[int], coarse: Sequence[int], kernel: Any) -> Any:
    """Which points of the fine grid the kernel takes for each of the coarse one, as a matrix."""
    rows, columns = [], []
    steps = list(zip(op.get("stride"), op.get("padding"), op.get("dilation"), strict=True))
    target = np.indices(coarse).reshape(len(coarse), -1)
    for offset in every(*(range(size) for size in kernel)):
        source = np.stack(
            [t * s + o * d - p for t, o, (s, p, d) in zip(target, offset, steps, strict=True)]
        )
        inside = ((source >= 0) & (source < np.array(fine)[:, None])).all(axis=0)
        rows.append(np.flatnonzero(inside))
        columns.append(np.ravel_multi_index(tuple(source[:, inside]), tuple(fine)))
    r, c = np.concatenate(rows), np.concatenate(columns)
    shape = (int(np.prod(coarse)), int(np.prod(fine)))
    return scipy.sparse.csr_array((np.ones(len(r), bool), (r, c)), shape)


def convolved(op: Operands, shape: Sequence[int]) -> Reach:
    """The result; a zero in the kernel counts as any number."""
    (x, reach), (weight, of_weight) = op.tensor("input"), op.tensor("weight")
    kernel, groups = weight.shape[2:], op.get("groups")
    if op.get("transposed"):
        window = windows(op, shape[2:], x.shape[2:], kernel).T.tocsr()
    else:
        window = windows(op, x.shape[2:], shape[2:], kernel)
    parts = [through(reach, window, shape[0], x.shape[1], shape[1], groups)]
    # Every entry of the weight meets every place.
    parts.append(everywhere(weight, of_weight, shape))
    if isinstance(op.get("bias"), Tensor):
        bias, of_bias = op.tensor("bias")
        ones = [1] * len(kernel)
        parts.append(broadcast(bias.reshape(-1, *ones), of_bias, shape))
    return united(parts)


def convolved_back(op: Operands, outputs: Sequence[Any]) -> list[Reach]:
    """The derivatives by input, weight and bias."""
    (g, of_g), (x, of_x) = op.tensor("grad_output"), op.tensor("input")
    weight, of_weight = op.tensor("weight")
    kernel, groups = weight.shape[2:], op.get("groups")
    if op.get("transposed"):
        window = windows(op, g.shape[2:], x.shape[2:], kernel)
    else:
        window = windows(op, x.shape[2:], g.shape[2:], kernel).T.tocsr()
    reached: list[Reach] = [
        united(
            [
                through(of_g, window, x.shape[0], g.shape[1], x.shape[1], groups),
                everywhere(weight, of_weight, x.shape),
            ]
        )
    ]
    for out, parts in zip(outputs[1:], ([(g, of_g), (x, of_x)], [(g, of_g)]), strict=True):
        shape = out.shape if isinstance(out, Tensor) else torch.Size([0])
        reached.append(united(everywhere(y, reach, shape) for y, reach in parts))
    return reached
