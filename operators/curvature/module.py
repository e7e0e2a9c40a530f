"""`functional`: a torch.nn.Module as a pure function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from operators.space import Tree
from operators.tracing import memory


def functional(module: nn.Module) -> tuple[FunctionalModule, dict[str, Tensor]]:
    """``(model, y)`` with ``model(y, *inputs)`` the module's output at the parameters y.

    Parameters
    ----------
    module
        Any module whose output is a function of parameters, buffers and inputs.

    Returns
    -------
    model
        A pure function; see `FunctionalModule`.
    y
        The parameters that require gradients, by name, each once however often it is used (tied
        weights). They share memory with the module's, without their autograd history: derivatives
        are those with respect to y. Take from this dictionary what is not to vary: what is left
        out keeps the module's value.

    Raises
    ------
    TypeError
        Not a module.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> model, y = functional(net)
    >>> {name: tuple(value.shape) for name, value in y.items()}
    {'weight': (1, 2), 'bias': (1,)}
    >>> x = torch.ones(3, 2)
    >>> bool((model(y, x) == net(x)).all())
    True
    """
    model = FunctionalModule(module)
    names = (name for name, value in module.named_parameters() if value.requires_grad)
    return model, {name: model.state[name] for name in names}


class FunctionalModule:
    """``model(y, *inputs, **options)``: the output of a module at the parameters y.

    Parameters
    ----------
    module
        The module. It is called, never changed; buffers and the parameters that y leaves out have
        the values of the module's own tensors (in-place changes of them are seen, new tensors put
        in their place are not).

    Raises
    ------
    TypeError
        Not a module.
    ValueError
        When called: y names a parameter or buffer that the module has not; or a submodule is in
        training mode whose output is then no function of one sample (BatchNorm couples the samples
        of a batch and moves its statistics, dropout draws random numbers): call
        ``module.eval()``.

    Notes
    -----
    The call goes through `torch.func.functional_call`, so it passes through torch.func. Attention
    is computed step by step, not by torch's fused kernels, which have no second derivatives and no
    forward mode; it takes the memory of the matrix of all pairs of positions.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is a {type(module).__name__}; expected a torch.nn.Module")
        self.module = module
        tensors = (*module.named_parameters(), *module.named_buffers())
        self.state = {name: value.detach() for name, value in tensors}

    def __call__(self, y: dict[str, Tensor], *inputs: Any, **options: Any) -> Any:
        """The module's output for `inputs` and keyword `options`."""
        unknown = [name for name in y if name not in self.state]
        if unknown:
            raise ValueError(
                f"y names {unknown}, which {type(self.module).__name__} has not; "
                f"expected names among {list(self.state)} (a tied weight goes by its first name)"
            )
        for name, part in self.module.named_modules():
            fault = _fault(part)
            if fault:
                raise ValueError(
                    f"{name or 'module'} is a {type(part).__name__} {fault}; "
                    "call module.eval() first, or use a layer without it"
                )
        state = {**self.state, **y}
        with _unfused():
            return torch.func.functional_call(self.module, state, inputs, options, strict=True)

    def __tensors__(self) -> list[Any]:
        """What it uses besides its arguments; never the module's own, which carry gradients."""
        unregistered = [
            value
            for part in self.module.modules()
            for name, value in (*vars(part).items(), ("forward", type(part).forward))
            if not name.startswith("_")
        ]
        return [*self.state.values(), *unregistered]

    def __eq__(self, other: object) -> bool:
        """Whether it is of the same module, with the same tensors in memory."""
        return isinstance(other, FunctionalModule) and (
            self.module is other.module and self._places() == other._places()
        )

    def __hash__(self) -> int:
        return id(self.module)

    def _places(self) -> dict[str, int]:
        return {name: memory(value) for name, value in self.state.items()}

    def __repr__(self) -> str:
        return f"functional({type(self.module).__name__})"


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention in operations that can be differentiated twice and in forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _fault(part: nn.Module) -> str:
    """Why the output of `part` is no function of parameters and one sample; empty if it is."""
    if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
        return "that normalises by the statistics of the batch, which couples its samples"
    if not part.training:
        return ""
    if isinstance(part, _NormBase) and part.track_running_stats:
        return "in training mode, which moves its running statistics"
    # Recurrent layers and attention carry the rate of a dropout of their own.
    rate = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0.0)
    if isinstance(part, nn.RReLU) or (isinstance(rate, float) and rate > 0):
        return "in training mode, which draws random numbers"
    return ""


def as_function(
    model: nn.Module | Callable[[Tree, Tree], Tree], y: Tree | None
) -> tuple[Callable[[Tree, Tree], Tree], Tree]:
    """``(f(y, inputs), y)`` of a module or a function.

    A tuple of inputs is handed to a module as its positional arguments, to a function as it is.

    Raises
    ------
    TypeError
        Neither, or a function without y.
    ValueError
        y is None and no parameter of the module requires gradients.
    """
    if isinstance(model, nn.Module):
        model, parameters = functional(model)
        if y is None and not parameters:
            raise ValueError(
                f"no parameter of {model!r} requires gradients; pass y, the dict of those to vary"
            )
        y = parameters if y is None else y
    if isinstance(model, FunctionalModule):
        return _Spread(model), y
    if not callable(model):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a torch.nn.Module or a function "
            "model(y, inputs)"
        )
    if y is None:
        raise TypeError("y is None; it stands for a module's parameters, and model is a function")
    return model, y


@dataclass(frozen=True)
class _Spread:
    """``f(y, inputs)`` of a functional module: a tuple of inputs is its positional arguments."""

    model: FunctionalModule

    def __call__(self, y: Tree, inputs: Tree) -> Tree:
        return self.model(y, *inputs) if isinstance(inputs, tuple) else self.model(y, inputs)

    def __repr__(self) -> str:
        return repr(self.model)
