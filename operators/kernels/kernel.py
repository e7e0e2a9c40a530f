"""`Kernel`: a positive definite function of two points, and what functionals make of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.kernels.functionals import Functionals
from operators.kernels.jets import Field
from operators.kernels.pullback import weighted

Lift = Any
Positive = float | Tensor


def _flatten(kernel: Kernel) -> tuple[list[Any], tuple[tuple[str, ...], dict[str, Any]]]:
    names = kernel._parameters
    rest = {name: value for name, value in kernel.__dict__.items() if name not in names}
    return [getattr(kernel, name) for name in names], (names, rest)


def _unflatten(cls: type[Kernel], values: Any, context: tuple[Any, dict[str, Any]]) -> Kernel:
    kernel = object.__new__(cls)
    names, rest = context
    kernel.__dict__.update(rest, **dict(zip(names, values, strict=True)))
    return kernel


class Kernel(ABC):
    """``k(x, y)``, and ``L_i M_j k``: functionals of its arguments, without forming derivatives.

    Two stages. `lift` works point by point: it rewrites each functional in the coordinates in which
    the kernel is simple, and is where networks are evaluated, n times. `pairs` works pair by pair
    on what was lifted, in closed form.

    Kernels combine by ``k + k``, ``k * k`` and ``c * k`` for a positive number. A kernel is a
    pytree: its tensors are what torch.func differentiates. Positive parameters are held by their
    logarithms, in float64 unless tensors of another dtype are given; a parameter that is given as a
    tensor keeps its graph.

    Examples
    --------
    >>> import torch, operators as ops
    >>> x = torch.rand(4, 2, dtype=torch.float64)
    >>> k = 2.0 * ops.RBF(0.5) + ops.Linear()
    >>> k(x, x).shape
    torch.Size([4, 4])
    >>> list(k.parameters)
    ['left.log_variance', 'left.kernel.log_lengthscale', 'right.log_variance']
    """

    # Attributes that hold tensors, dictionaries of tensors, or kernels. The rest is fixed.
    _parameters: ClassVar[tuple[str, ...]] = ()
    # Attributes that only say where the parameters came from.
    _unread: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        pytree.register_pytree_node(cls, _flatten, partial(_unflatten, cls))

    # --- what a subclass defines --------------------------------------------------------------

    @abstractmethod
    def lift(self, L: Functionals) -> Lift:
        """What `pairs` needs of each functional: a tree of tensors whose rows are those of L."""

    @abstractmethod
    def pairs(self, left: Lift, right: Lift) -> Tensor:
        """``L_i M_j k``, of shape ``(..., n, m)``, from what was lifted."""

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:
        """``sum_ij W_ij L_i M_j k``, for its derivative: the number itself may be NaN."""
        return weighted(self.pairs(left, right), W)

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:
        """The lift of each functional times a number; by default of one that is `Functionals`."""
        return lift * factors

    @property
    def smoothness(self) -> float:
        """A functional may take derivatives of orders below this; infinite for smooth kernels."""
        return float("inf")

    # --- what it does -------------------------------------------------------------------------

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``k(x_i, y_j)``: ``(n, d)`` and ``(m, d)`` to ``(n, m)``; y is x by default."""
        left = self.lift(Functionals.value_at(x))
        right = left if y is None else self.lift(Functionals.value_at(y))
        return self.pairs(left, right)

    def variances(self, L: Functionals) -> Tensor:
        """``L_i L_i k``, ``(n,)``: what the functionals vary by under the prior."""
        lifted = pytree.tree_map(lambda leaf: leaf.unsqueeze(1), self.lift(L))
        return self.pairs(lifted, lifted)[..., 0, 0]

    def check_smooth(self, L: Functionals) -> None:
        """Raise unless the kernel has the derivatives that L takes.

        Raises
        ------
        ValueError
            It has not.
        """
        if L.order >= self.smoothness:
            raise ValueError(
                f"{self!r} has no derivatives of order {L.order} in each argument; take a smoother "
                "kernel (Matern 5/2 and above have Laplacians), or functionals of lower order"
            )

    # --- parameters ---------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Its tensors by name; those of a part under the name of the part and a dot."""
        named: dict[str, Tensor] = {}
        for name in self._parameters:
            _name(named, name, getattr(self, name))
        return named

    def with_parameters(self, parameters: dict[str, Tensor]) -> Kernel:
        """The same kernel of other tensors, by the names of `parameters`; those left out stay.

        Raises
        ------
        ValueError
            A name that it has not, or a tensor of another shape.
        """
        known = self.parameters
        for name, tensor in parameters.items():
            if name not in known:
                raise ValueError(f"{name!r} is no parameter of {self!r}; it has {', '.join(known)}")
            if tensor.shape != known[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected {tuple(known[name].shape)}"
                )
        leaves, treespec = pytree.tree_flatten(self)
        changed = [parameters.get(name, leaf) for name, leaf in zip(known, leaves, strict=True)]
        return pytree.tree_unflatten(changed, treespec)

    # --- algebra ------------------------------------------------------------------------------

    def __add__(self, other: Kernel) -> Kernel:
        return SumKernel(self, other) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Kernel | Positive) -> Kernel:
        if isinstance(other, Kernel):
            return ProductKernel(self, other)
        if isinstance(other, (int, float, Tensor)):
            return ScaledKernel(self, other)
        return NotImplemented

    __rmul__ = __mul__

    def __repr__(self) -> str:
        held = ", ".join(_shown(name, getattr(self, name)) for name in self._parameters)
        return f"{type(self).__name__}({held})"


class SumKernel(Kernel):
    """``k_1 + k_2``: the sum of two independent processes."""

    _parameters = ("left", "right")

    def __init__(self, left: Kernel, right: Kernel) -> None:
        self.left, self.right = left, right

    @property
    def smoothness(self) -> float:
        """Of the rougher one."""
        return min(self.left.smoothness, self.right.smoothness)

    def lift(self, L: Functionals) -> Lift:  # noqa: D102
        return self.left.lift(L), self.right.lift(L)

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:  # noqa: D102
        return self.left.scale_lift(lift[0], factors), self.right.scale_lift(lift[1], factors)

    def pairs(self, left: Lift, right: Lift) -> Tensor:  # noqa: D102
        return self.left.pairs(left[0], right[0]) + self.right.pairs(left[1], right[1])

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:  # noqa: D102
        first = self.left.weighted_pairs(left[0], right[0], W)
        return first + self.right.weighted_pairs(left[1], right[1], W)

    def __repr__(self) -> str:
        return f"{self.left!r} + {self.right!r}"


class ScaledKernel(Kernel):
    """``variance k``; each functional takes its square root."""

    _parameters = ("log_variance", "kernel")

    def __init__(self, kernel: Kernel, variance: Positive) -> None:
        self.log_variance, self.kernel = log_of(variance, "variance", single=True), kernel

    @property
    def smoothness(self) -> float:
        """Of the kernel."""
        return self.kernel.smoothness

    def lift(self, L: Functionals) -> Lift:  # noqa: D102
        return self.kernel.lift(L * (0.5 * self.log_variance).exp())

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:  # noqa: D102
        return self.kernel.scale_lift(lift, factors)

    def pairs(self, left: Lift, right: Lift) -> Tensor:  # noqa: D102
        return self.kernel.pairs(left, right)

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:  # noqa: D102
        return self.kernel.weighted_pairs(left, right, W)

    def __repr__(self) -> str:
        return f"{_number(self.log_variance.exp())} * {_factor(self.kernel)}"


class ProductKernel(Kernel):
    """``k_1 k_2``, by Leibniz' rule: ``L (u v) = sum_s (P_s u) (Q_s v)`` for d + 2 pairs (P, Q).

    ``L (u v) = u L v + v (L - L 1) u + 2 sum_a d_a u (S grad v)_a``. So a block of second-order
    functionals costs up to ``(d + 2)^2`` blocks of each factor; what is zero is left out. Products
    of `RBF` kernels over coordinates are one RBF with a length for each, which is far cheaper.
    """

    _parameters = ("left", "right")

    def __init__(self, left: Kernel, right: Kernel) -> None:
        self.left, self.right = left, right

    @property
    def smoothness(self) -> float:
        """Of the rougher one."""
        return min(self.left.smoothness, self.right.smoothness)

    def lift(self, L: Functionals) -> Lift:  # noqa: D102
        return [(self.left.lift(P), self.right.lift(Q)) for P, Q in _splits(L)]

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:  # noqa: D102
        return [(self.left.scale_lift(P, factors), Q) for P, Q in lift]

    def pairs(self, left: Lift, right: Lift) -> Tensor:  # noqa: D102
        total = None
        for P, Q in left:
            for P2, Q2 in right:
                term = self.left.pairs(P, P2) * self.right.pairs(Q, Q2)
                total = term if total is None else total + term
        assert total is not None
        return total

    def __repr__(self) -> str:
        return f"{_factor(self.left)} * {_factor(self.right)}"


def _factor(kernel: Kernel) -> str:
    return f"({kernel!r})" if isinstance(kernel, SumKernel) else repr(kernel)


def _splits(L: Functionals) -> list[tuple[Functionals, Functionals]]:
    x = L.points
    one = Functionals.value_at(x)
    splits = [(one, L)]
    if L.order:
        splits.append((replace(L, value=None), one))
    second = L.second()
    if second is not None:
        for a in range(L.dimension):
            partners = tuple(c if b == a else b for b, c in L.couplings if a in (b, c))
            if partners:
                slope = Functionals(x, gradient=2 * second[..., a, :], axes=partners)
                splits.append((Functionals.gradient_at(x, a), slope))
    return splits


def checked(kernel: Any) -> Kernel:
    """The kernel itself.

    Raises
    ------
    TypeError
        It is none.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel is a {type(kernel).__name__}; expected a Kernel")
    return kernel


def log_of(value: Positive, name: str, *, single: bool = False) -> Tensor:
    """Logarithm of a positive number or tensor, with its graph.

    Raises
    ------
    ValueError
        It is not positive, or not finite; or several numbers where a `single` one is meant.
    TypeError
        It is no number.
    """
    if not isinstance(value, (int, float, Tensor)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}; expected a positive number or a tensor of them")
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; expected a floating dtype")
    if single and tensor.ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a number")
    known = tensor.detach()
    if not torch._C._functorch.is_functorch_wrapped_tensor(known) and not bool(
        ((known > 0) & torch.isfinite(known)).all()
    ):
        raise ValueError(f"{name}={value}; expected positive finite numbers")
    return tensor.log()


def log_lengths(lengthscale: Positive) -> Tensor:
    """`log_of` a length, or of one for each coordinate.

    Raises
    ------
    ValueError
        It has more than one axis.
    """
    lengths = log_of(lengthscale, "lengthscale")
    if lengths.ndim > 1:
        raise ValueError(
            f"lengthscale has shape {tuple(lengths.shape)}; expected a number or one for each "
            "coordinate"
        )
    return lengths


def check_lengths(kernel: Kernel, lengths: Tensor, d: int) -> None:
    """Raise unless there is one length, or d of them.

    Raises
    ------
    ValueError
        There is another number.
    """
    if lengths.ndim and len(lengths) != d:
        raise ValueError(f"{kernel!r} has {len(lengths)} lengths for points of dimension {d}")


def _name(named: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, (Kernel, Field)):
        value = value.parameters
    if isinstance(value, dict):
        for part, tensor in value.items():
            _name(named, f"{name}.{part}", tensor)
    elif value is not None:
        named[name] = value


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        if name.startswith("log_"):
            return f"{name.removeprefix('log_')}={_number(value.exp())}"
        return f"{name}={_number(value)}"
    if isinstance(value, dict):
        return f"{sum(tensor.numel() for tensor in value.values())} parameters"
    return repr(value)


def _number(value: Tensor) -> str:
    value = value.detach()
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return "..."
    if value.numel() > 6:
        return f"tensor{tuple(value.shape)}"
    shown = [f"{entry:.4g}" for entry in value.flatten().tolist()]
    return shown[0] if value.ndim == 0 else f"[{', '.join(shown)}]"
