"""What all randomised estimates share: their result, their test vectors, and when to stop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from operators.linear_operator import LinearOperator
from operators.tracing import readable

Probes = Literal["rademacher", "sphere", "gaussian"]

# Coordinate vectors that are multiplied at once where a quantity is formed by n products.
COLUMNS = 256


@dataclass(frozen=True, eq=False)
class TraceEstimate:
    """A trace, a diagonal or a log-determinant, and how far it can be trusted.

    Parameters
    ----------
    value
        A scalar, or the diagonal ``(n,)``; differentiable.
    error
        Like `value`: estimate of ``|value - exact|``, one standard error plus `bias`. It is itself
        random, and no bound: of k samples it is known to about ``1 / sqrt(2 k)`` of itself. Zero
        where `exact`.
    exact
        Whether nothing but rounding stands between `value` and the truth.
    method
        ``"structure"``, ``"exact"``, or the name of the estimator.
    products
        Products ``A v`` and ``A^T v`` that were spent.
    bias
        Scalar: the part of `error` that more samples would not reduce. None is zero.

    Examples
    --------
    >>> import torch
    >>> TraceEstimate.known(torch.tensor(3.0), "structure", products=0)
    TraceEstimate(value=tensor(3.), error=tensor(0.), exact=True, method='structure', products=0)
    """

    value: Tensor
    error: Tensor
    exact: bool
    method: str
    products: int
    bias: Tensor | None = field(default=None, repr=False)

    @classmethod
    def known(cls, value: Tensor, method: str, products: int) -> TraceEstimate:
        """An exact value."""
        return cls(value, torch.zeros_like(value.detach()), True, method, products)


def check_arguments(
    A: LinearOperator,
    method: str | None,
    methods: tuple[str, ...],
    rtol: float | None,
    max_products: int | None,
) -> None:
    """Raise for what no estimator can work with; then try the claims of A."""
    if not isinstance(A, LinearOperator):
        raise TypeError(f"A is a {type(A).__name__}; expected a LinearOperator, e.g. Dense(matrix)")
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"{A!r} is not square; it has no trace, diagonal or determinant")
    if method is not None and method not in methods:
        raise ValueError(f"method={method!r}; expected one of {methods}, or None to choose")
    if rtol is not None and not (math.isfinite(rtol) and rtol > 0):
        raise ValueError(f"rtol={rtol}; expected a number > 0, or None")
    if max_products is not None and rtol is None:
        raise ValueError(f"max_products={max_products} limits the search for rtol; give rtol too")
    A.check_claims()


def check_count(name: str, count: int, least: int) -> None:
    """Raise unless `count` is an integer of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} is a {type(count).__name__}; expected an integer")
    if count < least:
        raise ValueError(f"{name}={count}; expected at least {least}")


def check_finite(A: LinearOperator, product: Tensor) -> None:
    """Raise where a product holds NaN or infinity."""
    if readable(product) and not bool(torch.isfinite(product).all()):
        raise ValueError(f"a product with {A!r} is not finite")


def random_vectors(
    A: LinearOperator, count: int, probes: Probes, generator: torch.Generator | None
) -> Tensor:
    """Block ``(n, count)`` of independent columns with ``E[v v^T] = I``.

    ``"rademacher"``: signs, the least variance for a matrix of no special kind. ``"sphere"``:
    uniform on the sphere of radius ``sqrt(n)``; invariant under rotations. ``"gaussian"``: standard
    normal. They are drawn on the device of the generator, by default one seeded with 0.
    """
    if probes not in get_args(Probes):
        raise ValueError(f"probes={probes!r}; expected one of {get_args(Probes)}")
    generator = generator or torch.Generator(A.device).manual_seed(0)
    shape, device = (A.shape[1], count), generator.device
    # Under vmap torch would refuse to draw; here the vectors are the same for all that is mapped.
    with torch._C._DisableFuncTorch():
        if probes == "rademacher":
            signs = 2 * torch.randint(0, 2, shape, generator=generator, device=device) - 1
            return signs.to(dtype=A.dtype, device=A.device)
        normal = torch.randn(shape, generator=generator, dtype=A.dtype, device=device).to(A.device)
        if probes == "gaussian":
            return normal
        return math.sqrt(shape[0]) * normal / normal.norm(dim=0)


def standard_error(samples: Tensor) -> Tensor:
    """Estimated standard deviation of the mean over the last axis; a constant."""
    return samples.detach().std(dim=-1) / math.sqrt(samples.shape[-1])


def exact_diagonal(A: LinearOperator) -> TraceEstimate:
    """Diagonal by n products with coordinate vectors, a block at a time."""
    n = A.shape[0]
    pieces = [torch.zeros(0, dtype=A.dtype, device=A.device)]
    for start in range(0, n, COLUMNS):
        rows = torch.arange(start, min(start + COLUMNS, n), device=A.device)
        block = torch.zeros(n, len(rows), dtype=A.dtype, device=A.device)
        block[rows, rows - start] = 1
        image = A._matmat(block)
        check_finite(A, image)
        pieces.append(image[start : start + len(rows)].diagonal())
    return TraceEstimate.known(torch.cat(pieces), "exact", n)


def refined(
    attempt: Callable[..., TraceEstimate],
    plan: tuple[int, ...],
    larger: Callable[[tuple[int, ...], TraceEstimate], tuple[int, ...]],
    exact: Callable[[], TraceEstimate],
    n: int,
    rtol: float | None,
    max_products: int | None,
) -> TraceEstimate:
    """Attempts by larger and larger plans until ``|error| <= rtol |value|`` or the budget is spent.

    A plan costs the product of its numbers. From n products on the exact answer is cheaper.
    Attempts share no test vectors, so that no selection among one sample's subsets biases them.
    """
    spent = 0
    while True:
        estimate = attempt(*plan)
        spent += estimate.products
        estimate = replace(estimate, products=spent)
        if rtol is None:
            return estimate
        if not readable(estimate.value, estimate.error):
            raise ValueError("rtol reads the estimates; inside vmap spend a fixed number instead")
        error, size = float(estimate.error.norm()), float(estimate.value.detach().norm())
        if error <= rtol * size:
            return estimate
        plan = larger(plan, estimate)
        cost = math.prod(plan)
        if max_products is not None and spent + min(cost, n) > max_products:
            warnings.warn(
                f"{estimate.method} reached an estimated relative error of "
                f"{error / size if size else math.inf:.3g} instead of rtol={rtol:.3g} in {spent} "
                f"products; max_products={max_products} allows no larger attempt",
                RuntimeWarning,
                stacklevel=3,
            )
            return estimate
        if cost >= n:
            return replace(exact(), products=spent + n)
