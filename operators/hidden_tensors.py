"""Tensors that a derivative would pass by: those that functions in an operator reach unasked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch

from operators.closures import Closure
from operators.linear_operator import LinearOperator
from operators.tracing import memory, tracked


def refuse_hidden_tensors(A: LinearOperator, closure: Closure) -> None:
    """Raise where a function inside A reaches a tensor that is being differentiated or mapped.

    Parameters
    ----------
    A, closure
        Operator, and what functions inside it reach (`operators.closures.closure_of`).

    Raises
    ------
    ValueError
        There is one, and A has no tensor of its own in its place.
    """
    given: set[int] | None = None
    for tensor in closure.tensors:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if _functorch.is_functorch_wrapped_tensor(tensor):
            # What a transform that is over has left behind is a constant.
            if _functorch.is_dead_tensor_wrapper(tensor):  # type: ignore[attr-defined]
                continue
        elif not tracked(tensor):
            continue
        else:
            given = _given(A, closure) if given is None else given
            if memory(tensor) in given:
                continue
        raise ValueError(
            f"a function in {A!r} closes over a tensor of shape {tuple(tensor.shape)} that "
            "is being differentiated or mapped; its derivative through the inverse would be a "
            "silent zero: hand it over as an argument, as Hessian(loss, y, x) with loss(y, x), or "
            "solve under torch.no_grad() where no derivative is wanted"
        )


def _given(A: LinearOperator, closure: Closure) -> set[int]:
    """Memory of tensors that are reached, but for which A has its own.

    Those of a module that is called by its parameters, where these share memory with what A has;
    and where ``functional_call`` puts what A has under their names in their place.
    """
    wrapped = _functorch.is_functorch_wrapped_tensor
    given = {memory(tensor) for tensor in A.tensors if not wrapped(tensor)}
    if "functional_call" in closure.names:
        for names in _dictionaries(A):
            fitting = [module for module in closure.modules if _fits(names, module)]
            # Of two modules that fit, one may be called as it is.
            if len(fitting) == 1:
                parameters = dict(fitting[0].named_parameters())
                given |= {memory(parameters[name]) for name in names if name in parameters}
    return given


def _dictionaries(value: Any) -> Iterator[dict[str, Tensor]]:
    """Dictionaries of tensors by name among the parameters of an operator."""
    if isinstance(value, LinearOperator):
        value = [value.__dict__.get(name) for name in value._parameters]
    if isinstance(value, dict) and all(isinstance(entry, Tensor) for entry in value.values()):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _dictionaries(part)


def _fits(names: dict[str, Tensor], module: nn.Module) -> bool:
    own = dict([*module.named_parameters(), *module.named_buffers()])
    return bool(names) and all(
        name in own and own[name].shape == tensor.shape for name, tensor in names.items()
    )
