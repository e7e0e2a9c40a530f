"""The arguments of one traced operation, with the unknowns that each tensor depends on."""

from __future__ import annotations

from typing import Any

import scipy.sparse
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from operators.coloured.reach import Reach, row_major, rows_taken


def has_derivative(x: Tensor) -> bool:
    """Whether it is of real or complex numbers: flags and indices depend on nothing."""
    return x.is_floating_point() or x.is_complex()


class Operands:
    """Arguments of one operation by name and by position, with what the tensors reach."""

    def __init__(self, interpreter: fx.Interpreter, n: fx.Node, reach: dict[fx.Node, Any]) -> None:
        assert isinstance(n.target, torch._ops.OpOverload)
        self.target = n.target
        self.nodes = [*n.args, *n.kwargs.values()]
        self.args, self.kwargs = interpreter.fetch_args_kwargs_from_env(n)
        schema = n.target._schema.arguments
        self.names = [a.name for a in schema[: len(n.args)]] + list(n.kwargs)
        self.defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.values = [*self.args, *self.kwargs.values()]
        self._reach = reach
        self.tensors = [
            (value, self._reach.get(node) if isinstance(node, fx.Node) else None)
            for node, value in zip(*self._flat(self.nodes, self.values), strict=True)
            if isinstance(value, Tensor)
        ]

    @staticmethod
    def _flat(nodes: Any, values: Any) -> tuple[list[Any], list[Any]]:
        def leaf(x: Any) -> bool:
            return not isinstance(x, (list, tuple))

        return pytree.tree_leaves(nodes, is_leaf=leaf), pytree.tree_leaves(values, is_leaf=leaf)

    def get(self, name: str) -> Any:
        """Argument of this name; indices on the CPU."""
        if name not in self.names:
            return self.defaults.get(name)
        return pytree.tree_map(
            lambda x: x.cpu() if isinstance(x, Tensor) else x, self.values[self.names.index(name)]
        )

    def tensor(self, name: str) -> tuple[Tensor, Reach]:
        """Tensor argument of this name."""
        position = self.names.index(name)
        node = self.nodes[position]
        return self.values[position], self._reach.get(node) if isinstance(node, fx.Node) else None

    def positions(self, move: str) -> Tensor:
        """Where a move takes its entries from, for its derivative (gradient, sizes, ...)."""
        overload = {"select": "int", "slice": "Tensor"}.get(move, "default")
        operation = getattr(getattr(torch.ops.aten, move), overload)
        where: Tensor = operation(row_major(self.values[1]), *self.values[2:])
        return where

    def moved(self) -> list[Reach]:
        """The operation done on numbers of rows, from 1; what is constant has the number 0."""
        matrices: list[scipy.sparse.csr_array] = []
        held = 1

        def number(node: Any, value: Any, name: str) -> Any:
            nonlocal held
            if isinstance(value, (list, tuple)):
                nodes = node if isinstance(node, (list, tuple)) else [None] * len(value)
                return [number(k, v, name) for k, v in zip(nodes, value, strict=True)]
            if isinstance(value, Tensor) and has_derivative(value):
                reach = self._reach.get(node) if isinstance(node, fx.Node) else None
                # as_strided counts in memory.
                strides = value.stride()
                numbered = torch.empty_strided(value.shape, strides, dtype=torch.float64)
                if reach is None:
                    return numbered.zero_()
                matrices.append(reach)
                held += value.numel()
                return numbered.copy_(held - value.numel() + row_major(value.shape).double())
            if isinstance(value, Tensor):
                return value.cpu()
            fills = name == "value" or name == "fill_value"
            return 0.0 if fills else value

        numbers = [
            number(node, value, name)
            for node, value, name in zip(self.nodes, self.values, self.names, strict=True)
        ]
        count = len(self.args)
        rest = dict(zip(self.names[count:], numbers[count:], strict=True))
        results = self.target(*numbers[:count], **rest)
        results = results if isinstance(results, (list, tuple)) else [results]
        return [rows_taken(matrices, result.reshape(-1).long().numpy()) for result in results]
