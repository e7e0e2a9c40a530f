"""The parameters of layers as matrices ``(p, d)``, the bias as last column: `LayerMatrices`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.claims import rounding
from operators.curvature.kronecker_factors import Factors, parameter_names
from operators.space import Space
from operators.tracing import readable


class Place(NamedTuple):
    """Where a layer is: the shape of its rows, ``(p,)`` or ``(G, p)``, and slices of a vector."""

    rows: tuple[int, ...]
    weight: slice | None
    bias: slice | None


@dataclass(frozen=True)
class LayerMatrices:
    """``R^n -> {layer: (p, d)}`` and back, for vectors with any leading axes.

    Parameters
    ----------
    places
        Place of each layer in the flat vector.
    """

    places: dict[str, Place]

    @classmethod
    def of(
        cls, factors: Mapping[str, Factors], space: Space, *, moments: bool = False
    ) -> LayerMatrices:
        """Layout of the layers that have factors, in a space of named parameters.

        Parameters
        ----------
        factors, space
            Factors of each layer, and the space.
        moments
            Whether they are known to be second moments, and so symmetric: that is not compared.

        Raises
        ------
        ValueError
            A factor is not a symmetric matrix or a stack of them, or not finite; factors and
            parameters do not fit, or a parameter has no factors.
        TypeError
            The space is not that of a dictionary of tensors; another dtype or device.
        """
        names = pytree.tree_unflatten(list(range(len(space.shapes))), space.treespec)
        if not isinstance(names, dict) or not all(isinstance(i, int) for i in names.values()):
            raise TypeError(f"space is {space}; expected that of a dictionary of named parameters")
        shapes = dict(zip(names, space.shapes, strict=True))
        slices, start = {}, 0
        for key, shape in shapes.items():
            slices[key] = slice(start, start + shape.numel())
            start += shape.numel()
        places = {}
        for name, pair in factors.items():
            _check_factors(name, pair, space, moments)
            weight, bias = (shapes.pop(key, None) for key in parameter_names(name))
            _check_sizes(name, pair, weight, bias)
            rows = tuple(pair.S.shape[:-1])
            places[name] = Place(rows, *(slices.get(key) for key in parameter_names(name)))
        if shapes:
            raise ValueError(f"the space has {list(shapes)}, for which there are no factors")
        return cls(places)

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """Matrices ``(..., p, d)``, or ``(..., G, p, d)``, of vectors ``(..., n)``."""
        matrices = {}
        for name, (rows, *place) in self.places.items():
            shape = (*v.shape[:-1], *rows, -1)
            parts = [v[..., part].reshape(shape) for part in place if part is not None]
            matrices[name] = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return matrices

    def join(self, matrices: dict[str, Tensor]) -> Tensor:
        """Vectors ``(..., n)`` of the matrices of all layers."""
        pieces: dict[int, Tensor] = {}
        for name, (rows, weight, bias) in self.places.items():
            V = matrices[name]
            shape = (*V.shape[: V.ndim - len(rows) - 1], -1)
            if bias is not None:
                pieces[bias.start] = V[..., -1].reshape(shape)
            if weight is not None:
                pieces[weight.start] = (V if bias is None else V[..., :-1]).reshape(shape)
        return torch.cat([pieces[start] for start in sorted(pieces)], -1)


def _check_sizes(
    name: str, pair: Factors, weight: torch.Size | None, bias: torch.Size | None
) -> None:
    rows, columns = pair.S.shape[:-1].numel(), pair.A.shape[-1]
    outputs = {shape[0] if shape else 0 for shape in (weight, bias) if shape is not None}
    inputs = (weight[1:].numel() if weight else 0) + (bias is not None)
    if outputs != {rows} or inputs != columns:
        of_weight, of_bias = (shape and tuple(shape) for shape in (weight, bias))
        raise ValueError(
            f"layer {name!r} has factors for {rows} x {columns} parameters, but the space has "
            f"weight {of_weight} and bias {of_bias} for it; the bias, if any, is one more column"
        )


def _check_factors(name: str, pair: Factors, space: Space, moments: bool) -> None:
    for which, factor in zip("SA", pair, strict=True):
        what = f"{which} of layer {name!r}"
        if not isinstance(factor, Tensor):
            raise TypeError(f"{what} is a {type(factor).__name__}; expected a tensor")
        if factor.ndim not in (2, 3) or factor.shape[-1] != factor.shape[-2] or not factor.numel():
            raise ValueError(
                f"{what} has shape {tuple(factor.shape)}; expected (k, k) or (G, k, k)"
            )
        if factor.dtype != space.dtype or factor.device != space.device:
            raise TypeError(
                f"{what} is {factor.dtype} on {factor.device}; expected {space.dtype} on "
                f"{space.device}"
            )
        if not readable(factor):
            continue
        if moments:
            # |A_ij|^2 <= A_ii A_jj: the diagonal says whether all entries are finite.
            if not bool(torch.isfinite(factor.diagonal(0, -2, -1)).all()):
                raise ValueError(f"{what} is not finite; expected finite numbers")
            continue
        size = factor.detach().abs().max()
        skew = (factor - factor.mT).detach().abs().max()
        if not bool(skew <= rounding(factor.dtype) * size):  # NaN lands here too
            raise ValueError(
                f"{what} is not symmetric, or not finite: max |{which}| = {float(size):.3g}, "
                f"max |{which} - {which}^T| = {float(skew):.3g}"
            )
    if pair.S.shape[:-2] != pair.A.shape[:-2]:
        raise ValueError(
            f"layer {name!r} has S of shape {tuple(pair.S.shape)} and A of shape "
            f"{tuple(pair.A.shape)}; expected as many groups in both"
        )
