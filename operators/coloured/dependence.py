"""Which entries of a function's result can depend on which of its argument, from its graph.

The function is traced to aten operations; each tensor then carries a boolean matrix: its entries
against those of the argument. Values never enter, so what is found holds for every argument that
takes the same path through the function. Indices and flags that are computed from the argument are
such values: an operation that is steered by them is taken to join all that it could.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from operators.coloured.convolution_reach import convolved, convolved_back
from operators.coloured.operands import Operands, has_derivative
from operators.coloured.reach import (
    Reach,
    along,
    broadcast,
    multiplied,
    reduced,
    row_major,
    sent,
    united,
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that put entries elsewhere; what they fill in is constant.
MOVES = _names(
    """
    _reshape_alias _unsafe_index _unsafe_view alias as_strided as_strided_scatter block_diag cat
    chunk constant_pad_nd detach diag_embed diagonal diagonal_scatter expand flip gather im2col
    index index_copy index_fill index_select lift_fresh masked_fill masked_scatter masked_select
    movedim narrow permute pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d
    reflection_pad3d repeat replication_pad1d replication_pad2d replication_pad3d reshape roll rot90
    scatter select select_scatter slice slice_scatter split split_with_sizes squeeze stack t take
    transpose tril triu unbind unfold unsqueeze view
    """
)
# Derivatives of moves: entry k of the first argument is added at position k of the move.
ADJOINTS: dict[str, str] = {
    "diagonal_backward": "diagonal",
    "select_backward": "select",
    "slice_backward": "slice",
    "unfold_backward": "unfold",
}
REDUCTIONS = _names(
    """
    amax amin linalg_vector_norm logsumexp max mean min nansum norm prod std std_mean sum var
    var_mean
    """
)
# Each entry depends on the whole line along a dimension.
ALONG = _names(
    """
    _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data cummax cummin cumprod
    cumsum logcumsumexp sort
    """
)
POINTWISE = _names("_to_copy clone contiguous lerp")
# Their values depend on nothing but shapes.
BLANKS = _names(
    """
    empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like rand_like
    randn_like zeros_like
    """
)
# Their derivative is zero wherever there is one.
STEPS = _names("ceil floor heaviside round sign trunc")
# Where they take or put entries may be said by a tensor of indices or flags.
STEERED = MOVES | _names("_unsafe_index_put index_add index_put scatter_add scatter_reduce")
# (position of the sum that is added to, and of the two factors)
PRODUCTS: dict[str, tuple[int | None, int, int]] = {
    "mm": (None, 0, 1),
    "bmm": (None, 0, 1),
    "mv": (None, 0, 1),
    "dot": (None, 0, 1),
    "vdot": (None, 0, 1),
    "addmm": (0, 1, 2),
    "addmv": (0, 1, 2),
    "baddbmm": (0, 1, 2),
}

# An operation that is not known may join every input with every output up to this many entries.
MOST_JOINED = 10**8


def reach_of(
    function: Callable[[Tensor], Tensor], u: Tensor
) -> tuple[scipy.sparse.csr_array, tuple[str, ...]]:
    """Which entries of ``function(u)`` can depend on which of u.

    Parameters
    ----------
    function
        From a vector ``(n,)`` to a vector ``(m,)``.
    u
        Example of its argument; only its shape counts, unless the function branches on values.

    Returns
    -------
    tuple
        Matrix of ones ``(m, n)``, and the names of operations that were not known: of these every
        output is taken to depend on every input.

    Raises
    ------
    ValueError
        The function reads values of u, or sizes inside it depend on them; or an operation that is
        not known is too large.

    Notes
    -----
    Costs four evaluations, and for each operation some passes over its matrix. Elementwise
    operations unite rows; slices, shifts, reshapes, indexing and their derivatives move them;
    reductions, products of matrices and convolutions unite along dimensions. What is found may be
    too much (a factor that is zero, two terms that cancel), never too little.
    """
    try:
        # Writes into views become functions of both: of the graph, for in one go with derivatives
        # torch mixes up which view was written.
        plain = make_fx(function)(u)
        traced = make_fx(torch.func.functionalize(plain, remove="mutations_and_views"))(u)
    except RuntimeError as error:
        raise ValueError(
            f"residual cannot be traced ({str(error).splitlines()[0]}); where it reads values of "
            "its argument its pattern depends on them: give sparsity=a pattern, or sparsity='probe'"
        ) from error
    propagation = _Propagation(traced, u.numel())
    # At a point without symmetries, where wrong values show.
    generator = torch.Generator(u.device).manual_seed(0)
    xi = torch.rand(u.shape, generator=generator, dtype=u.dtype, device=u.device)
    point = u + 0.01 * u.abs().clamp(min=1) * xi
    with torch.no_grad():
        value, traced_value = function(point), propagation.run(point)
    # A random function has no pattern, and what tracing gets wrong would go unseen.
    scale = value.abs().nan_to_num(0.0).max() if value.numel() else 0.0
    if not torch.allclose(value, traced_value, rtol=1e-3, atol=1e-3 * float(scale), equal_nan=True):
        raise ValueError(
            "residual has other values when it is traced (it is random, or cannot be "
            "traced); give sparsity=a pattern, or sparsity='probe'"
        )
    found = propagation.result
    if found is None:
        output = propagation.size
        found = scipy.sparse.csr_array((output, u.numel()), dtype=bool)
    return found, tuple(dict.fromkeys(propagation.unknown))


class _Propagation(fx.Interpreter):
    """Runs the graph, and beside each value its matrix."""

    def __init__(self, module: fx.GraphModule, inputs: int) -> None:
        super().__init__(module)
        self.inputs = inputs
        self.reach: dict[fx.Node, Any] = {}
        self.varying: set[fx.Node] = set()  # whose values are computed from those of the argument
        self.unknown: list[str] = []
        self.result: Reach = None
        self.size = 0

    def run_node(self, n: fx.Node) -> Any:
        """Run it, and find what it reaches."""
        value = super().run_node(n)
        if n.op == "placeholder":
            self.varying.add(n)
            self.reach[n] = scipy.sparse.eye_array(self.inputs, dtype=bool, format="csr")
        elif n.op == "output":
            node = n.args[0]
            self.result = self.reach[node] if isinstance(node, fx.Node) else None
            self.size = value.numel()
        elif n.op == "call_function":
            self.reach[n] = self._reach(n, value)
        else:
            self.reach[n] = None
        for last in self.user_to_last_uses.get(n, []):
            self.reach.pop(last, None)
        return value

    def _reach(self, n: fx.Node, value: Any) -> Any:
        varying = not self.varying.isdisjoint(n.all_input_nodes)
        if not isinstance(n.target, torch._ops.OpOverload):
            if varying:
                self.varying.add(n)
            whole = self.reach[n.args[0]]  # type: ignore[index]
            return whole[int(n.args[1])] if isinstance(whole, list) else None  # type: ignore[arg-type]
        name = n.target._schema.name.removeprefix("aten::").removesuffix("_copy")
        if varying and name not in BLANKS:
            self.varying.add(n)
            self._refuse_sizes(name, n)
        operands = Operands(self, n, self.reach)
        if not any(reach is not None for _, reach in operands.tensors):
            return None
        if n.target._schema.is_mutable:
            raise ValueError(
                f"residual writes into a tensor by {n.target}, which cannot be followed; give "
                "sparsity=a pattern, or sparsity='probe'"
            )
        outputs = value if isinstance(value, (list, tuple)) else [value]
        kept = [isinstance(out, Tensor) and has_derivative(out) for out in outputs]
        if name in BLANKS or name in STEPS or not any(kept):
            reached: list[Reach] = [None] * len(outputs)
        elif name in STEERED and self._steering(n):
            reached = self._steered(name, operands, outputs)
        else:
            reached = self._by_name(name, operands, outputs)
        reached = [reach if keep else None for reach, keep in zip(reached, kept, strict=True)]
        return reached if isinstance(value, (list, tuple)) else reached[0]

    def _steering(self, n: fx.Node) -> list[Tensor]:
        """Indices and flags among the arguments that vary with the argument of the function."""
        values = [self.env[node] for node in n.all_input_nodes if node in self.varying]
        return [x for x in values if isinstance(x, Tensor) and not has_derivative(x)]

    def _refuse_sizes(self, name: str, n: fx.Node) -> None:
        assert isinstance(n.target, torch._ops.OpOverload)
        flags = name == "index" and any(x.dtype == torch.bool for x in self._steering(n))
        if flags or (torch.Tag.dynamic_output_shape in n.target.tags and name != "index"):
            raise ValueError(
                f"residual has the operation {name}, whose result has a size that depends on "
                "values of the argument; take torch.where in place of a boolean index, give "
                "sparsity=a pattern, or sparsity='probe'"
            )

    def _steered(self, name: str, op: Operands, outputs: Sequence[Any]) -> list[Reach]:
        shape = outputs[0].shape
        flagged = name in ("index_put", "_unsafe_index_put") and all(
            x is None or x.dtype == torch.bool for x in op.get("indices")
        )
        if name == "masked_fill" or (flagged and op.get("values").numel() == 1):
            # Each entry is kept or filled.
            return [united(broadcast(x, r, shape) for x, r in op.tensors if has_derivative(x))]
        return self._joined(f"{name} by indices that vary", op, outputs)

    def _by_name(self, name: str, op: Operands, outputs: Sequence[Any]) -> list[Reach]:
        if name == "convolution_backward":
            return convolved_back(op, outputs)
        shape = outputs[0].shape
        if name == "copy":
            return [broadcast(*op.tensors[1], shape)]
        if name in POINTWISE or torch.Tag.pointwise in op.target.tags:
            return [united(broadcast(x, r, shape) for x, r in op.tensors)]
        if name in MOVES or (
            name in ("index_put", "_unsafe_index_put") and not op.get("accumulate")
        ):
            return op.moved()
        if name in ADJOINTS:
            return [_added(op, op.positions(ADJOINTS[name]), shape)]
        if name.endswith("d_backward") and name.removesuffix("_backward") in MOVES:
            pad = getattr(torch.ops.aten, name.removesuffix("_backward")).default
            at = pad(row_major(op.get("self").shape).double(), op.get("padding")).long()
            return [_added(op, at, shape)]
        if name in ("index_put", "_unsafe_index_put"):
            at = torch.ops.aten.index.Tensor(row_major(shape), op.get("indices"))
            values, reach = op.tensor("values")
            base = op.tensor("self")[1]
            return [united([base, sent(broadcast(values, reach, at.shape), at, shape)])]
        if name in ("scatter_add", "scatter_reduce"):
            dim, index = op.get("dim"), op.get("index")
            source, reach = op.tensor("src")
            # Of the source only what the index covers is used.
            used = row_major(source.shape)[tuple(slice(0, size) for size in index.shape)]
            taken = None if reach is None else reach[used.reshape(-1).numpy()]
            at = torch.gather(row_major(shape), dim, index)
            return [united([op.tensor("self")[1], sent(taken, at, shape)])]
        if name == "index_add":
            at = torch.index_select(row_major(shape), op.get("dim"), op.get("index"))
            return [united([op.tensor("self")[1], sent(op.tensor("source")[1], at, shape)])]
        if name in REDUCTIONS:
            return [reduced(*op.tensors[0], op.get("dim"))] * len(outputs)
        if name in ALONG:
            lines = united(along(x, r, op.get("dim")) for x, r in op.tensors)
            return [lines] * len(outputs)
        if name in PRODUCTS:
            added, left, right = PRODUCTS[name]
            parts = [multiplied(op.tensors[left], op.tensors[right], shape)]
            if added is not None:
                parts.append(broadcast(*op.tensors[added], shape))
            return [united(parts)]
        if name == "convolution":
            return [convolved(op, shape)]
        return self._joined(name, op, outputs)

    def _joined(self, name: str, op: Operands, outputs: Sequence[Any]) -> list[Reach]:
        self.unknown.append(name)
        everything = united(reduced(x, reach, None) for x, reach in op.tensors)
        assert everything is not None
        sizes = [out.numel() if isinstance(out, Tensor) else 0 for out in outputs]
        if sum(sizes) * everything.nnz > MOST_JOINED:
            raise ValueError(
                f"residual has the operation {name}, whose dependences are not known and which "
                f"joins {everything.nnz} unknowns with {sum(sizes)} results; give sparsity=a "
                "pattern, or sparsity='probe'"
            )
        return [everything[np.zeros(size, np.int64)] for size in sizes]


def _added(op: Operands, at: Tensor, shape: Sequence[int]) -> Reach:
    return sent(op.tensors[0][1], at, shape)


def warn_unknown(unknown: tuple[str, ...]) -> None:
    """Say which operations were taken to join everything."""
    if unknown:
        warnings.warn(
            f"the dependences of {', '.join(unknown)} are not known: every result of them is taken "
            "to depend on all that enters; give sparsity=a pattern for a sparser one",
            stacklevel=4,
        )
