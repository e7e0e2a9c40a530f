"""Changes of variable and of amplitude, which functionals absorb by the chain and product rules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from operators.kernels.functionals import Functionals
from operators.kernels.jets import Field, jets
from operators.kernels.kernel import Kernel, Lift, checked


def pulled_back(L: Functionals, image: tuple[Tensor, Tensor | None, Tensor | None]) -> Functionals:
    """``M`` at ``phi(x_i)`` with ``L_i (u o phi) = M_i u``.

    ``grad -> J g + S : D^2 phi``, ``S -> J S J^T``.

    Parameters
    ----------
    L
        Functionals at n points of dimension d.
    image
        ``phi (n, m)``, its Jacobian ``J (n, m, d)`` and Hessian ``(n, m, d, d)``; as many of them
        as the order of L needs.
    """
    points, jacobian, hessian = image
    second = L.second()
    gradient = None
    if L.gradient is not None:
        assert jacobian is not None
        gradient = (jacobian @ L.gradient[..., None])[..., 0]
    transported = None
    if second is not None:
        assert jacobian is not None
        transported = jacobian @ second @ jacobian.mT
        if hessian is not None:
            bent = (second[..., None, :, :] * hessian).sum((-2, -1))
            gradient = bent if gradient is None else gradient + bent
    return Functionals(points, L.value, gradient, None, transported)


def multiplied(L: Functionals, factor: tuple[Tensor, Tensor | None, Tensor | None]) -> Functionals:
    """``M_i u = L_i (a u)`` for a function a.

    Parameters
    ----------
    L
        Functionals at n points of dimension d.
    factor
        ``a (n,)``, its gradient ``(n, d)`` and Hessian ``(n, d, d)``; as many as L needs.
    """
    a, slope, bend = factor
    value, gradient = None, None
    if L.value is not None:
        value = L.value * a
    if L.gradient is not None:
        assert slope is not None
        gradient = a[..., None] * L.gradient
        value = _plus(value, (L.gradient * slope).sum(-1))
    second = L.second()
    if second is not None:
        assert slope is not None
        assert bend is not None
        gradient = _plus(gradient, 2 * (second @ slope[..., None])[..., 0])
        value = _plus(value, (second * bend).sum((-2, -1)))
    laplacian = None if L.laplacian is None else a * L.laplacian
    hessian = None if L.hessian is None else a[..., None, None] * L.hessian
    axes = L.axes if second is None else None
    return Functionals(L.points, value, gradient, laplacian, hessian, L.entries, axes)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def scaled(L: Functionals, lengthscale: Tensor) -> Functionals:
    """Functionals in the coordinates ``z = x / lengthscale``: one length, or one a coordinate."""
    points = L.points / lengthscale
    gradient = None if L.gradient is None else L.gradient / lengthscale
    if lengthscale.ndim == 0:
        square = lengthscale**2
        laplacian = None if L.laplacian is None else L.laplacian / square
        hessian = None if L.hessian is None else L.hessian / square
        return Functionals(points, L.value, gradient, laplacian, hessian, L.entries, L.axes)
    second = L.second()
    if second is not None:
        second = second / (lengthscale[:, None] * lengthscale)
    return Functionals(points, L.value, gradient, None, second, L.couplings, L.axes)


class WarpedKernel(Kernel):
    """``k(phi(x), phi(y))``: a deep kernel. The warp is evaluated once a point, with its 2-jet.

    Parameters
    ----------
    kernel
        On the image of the warp.
    warp
        Function ``(n, d) -> (n, m)``, row by row, or an `nn.Module`; its parameters are parameters
        of the kernel. What a plain function closes over is no parameter.

    Examples
    --------
    >>> import torch, operators as ops
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> k = ops.WarpedKernel(ops.RBF(1.0), net.double())
    >>> k(torch.rand(4, 2, dtype=torch.float64)).shape
    torch.Size([4, 4])
    """

    _parameters = ("kernel", "warp")

    def __init__(self, kernel: Kernel, warp: Any) -> None:
        self.kernel, self.warp = checked(kernel), Field.of(warp, "warp")

    @property
    def smoothness(self) -> float:
        """Of the kernel."""
        return self.kernel.smoothness

    def lift(self, L: Functionals) -> Lift:  # noqa: D102
        return self.kernel.lift(pulled_back(L, jets(self.warp, L.points, L.order)))

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:  # noqa: D102
        return self.kernel.scale_lift(lift, factors)

    def pairs(self, left: Lift, right: Lift) -> Tensor:  # noqa: D102
        return self.kernel.pairs(left, right)

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:  # noqa: D102
        return self.kernel.weighted_pairs(left, right, W)


class CoordinatesKernel(Kernel):
    """``k(x_S, y_S)``: a kernel of some coordinates, for sums and products over coordinates.

    Parameters
    ----------
    kernel
        Of points of dimension ``len(axes)``.
    axes
        Which coordinates it sees.

    Examples
    --------
    >>> import operators as ops
    >>> additive = ops.CoordinatesKernel(ops.RBF(0.3), [0]) + ops.CoordinatesKernel(
    ...     ops.RBF(1.0), [1]
    ... )
    >>> tensor = ops.CoordinatesKernel(ops.Matern(0.3), [0]) * ops.CoordinatesKernel(
    ...     ops.RBF(1.0), [1]
    ... )
    """

    _parameters = ("kernel",)

    def __init__(self, kernel: Kernel, axes: list[int] | tuple[int, ...]) -> None:
        if not axes or len(set(axes)) != len(axes) or min(axes) < 0:
            raise ValueError(
                f"axes={axes!r}; expected different coordinates, 0 or more, one at least"
            )
        self.kernel, self.axes = checked(kernel), tuple(axes)

    @property
    def smoothness(self) -> float:
        """Of the kernel."""
        return self.kernel.smoothness

    def lift(self, L: Functionals) -> Lift:  # noqa: D102
        if max(self.axes) >= L.dimension:
            raise ValueError(
                f"axes {self.axes} of points of dimension {L.dimension}; expected coordinates 0 to "
                f"{L.dimension - 1}"
            )
        axes = list(self.axes)
        points = L.points[..., axes]
        gradient = None if L.gradient is None else L.gradient[..., axes]
        second = L.second()
        if second is not None:
            second = second[..., axes, :][..., :, axes]
        return self.kernel.lift(Functionals(points, L.value, gradient, None, second))

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:  # noqa: D102
        return self.kernel.scale_lift(lift, factors)

    def pairs(self, left: Lift, right: Lift) -> Tensor:  # noqa: D102
        return self.kernel.pairs(left, right)

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:  # noqa: D102
        return self.kernel.weighted_pairs(left, right, W)

    def __repr__(self) -> str:
        return f"{self.kernel!r} of {list(self.axes)}"
