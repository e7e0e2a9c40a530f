"""The diagonal of an operator: from its structure, by n products, or estimated from fewer."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from operators.linear_operator import LinearOperator
from operators.randomized.monte_carlo import (
    TraceEstimate,
    check_arguments,
    check_count,
    check_finite,
    exact_diagonal,
    random_vectors,
    refined,
    standard_error,
)
from operators.randomized.traces import leave_one_out


def diagonal(
    A: LinearOperator,
    products: int = 60,
    *,
    method: Literal["exact", "hutchinson", "xdiag"] | None = None,
    rtol: float | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """``(A_11, ..., A_nn)``, with an estimate of the error of each entry.

    Parameters
    ----------
    A
        Square operator. XDiag multiplies with its transpose, too.
    products
        Products to spend, not counting those of earlier attempts under `rtol`.
    method
        ``"exact"``: from the structure, or else by n products. ``"hutchinson"``: the mean of
        ``v * (A v)`` for random signs v; the variance of entry i is
        ``sum_{j != i} A_ij^2 / products``. ``"xdiag"``: the diagonal of A on the range of a sketch
        and Hutchinson on the rest, each test vector serving for the sketch of all the others. By
        default what the structure gives; else n products where the budget allows them; else XDiag.
    rtol
        Double `products` until ``|error| <= rtol |value|`` in the Euclidean norm; ends with n
        products at the latest.
    max_products
        Limit of the sum of all attempts under `rtol`.
    generator
        Of random numbers; by default one seeded with 0: two calls take the same test vectors.

    Returns
    -------
    TraceEstimate
        `value` and `error` are ``(n,)``, in the flat order of ``A.domain``; for nested parameters
        ``A.domain.unravel(value)`` gives the tree.

    Raises
    ------
    ValueError
        A is not square, a product is not finite, or a setting is out of range.
    TypeError
        A is no operator, `products` no integer, or XDiag meets an operator without a transposed
        product.

    Warns
    -----
    RuntimeWarning
        `max_products` ended the search before `rtol` was met.

    Notes
    -----
    Unbiased. XDiag is exact to rounding for rank below half of the budget, and better than
    Hutchinson where the singular values decay. Hutchinson's error comes from large entries off the
    diagonal: for a matrix with few or fast decaying ones it is the better of the two, and for one
    that is known to be sparse, structure (a coloured pattern) is better than both. Holds
    ``n products`` numbers.

    XDiag's samples share vectors, so that `error` understates its error somewhat (see
    `operators.trace`).

    Derivatives as those of `operators.trace`: of any order, unbiased, the basis held constant.
    Under ``torch.func.vmap`` all operators get the same vectors; `rtol` is refused there.

    Source: Bekas, Kokiopoulou and Saad (2007, doi:10.1016/j.apnum.2007.01.003); Epperly, Tropp and
    Webber (2024, arXiv:2301.07825, section 2.4).

    Examples
    --------
    >>> import torch, operators as ops
    >>> U = ops.Dense(torch.arange(200.0)[:, None])
    >>> d = diagonal(U @ U.T, 8)
    >>> exact = torch.arange(200.0) ** 2
    >>> bool((d.value - exact).abs().max() < 1e-4 * exact.max()), d.method
    (True, 'xdiag')
    """
    estimators = {"hutchinson": _hutchinson, "xdiag": _xdiag}
    check_arguments(A, method, ("exact", *estimators), rtol, max_products)
    check_count("products", products, {"hutchinson": 2, "xdiag": 4}.get(str(method), 1))
    n = A.shape[0]
    if method in (None, "exact"):
        known = A._exact_diagonal()
        if known is not None:
            return TraceEstimate.known(known, "structure", 0)
        if method == "exact" or products >= n:
            return exact_diagonal(A)
        method = "xdiag"
        check_count("products", products, 4)
    if method == "xdiag" and products >= 2 * n:
        raise ValueError(
            f"products={products} for {A!r} sketch more than there is; "
            f"method='exact' costs {n} products"
        )
    generator = generator or torch.Generator(A.device).manual_seed(0)
    return refined(
        partial(estimators[str(method)], A, generator),
        (products,),
        lambda plan, _: (2 * plan[0],),
        partial(exact_diagonal, A),
        n,
        rtol,
        max_products,
    )


def _hutchinson(A: LinearOperator, generator: torch.Generator, products: int) -> TraceEstimate:
    # For signs the quotient of Bekas et al., sum v * (A v) / sum v * v, is the mean.
    vectors = random_vectors(A, products, "rademacher", generator)
    image = A._matmat(vectors)
    check_finite(A, image)
    samples = vectors * image
    return TraceEstimate(samples.mean(1), standard_error(samples), False, "hutchinson", products)


def _xdiag(A: LinearOperator, generator: torch.Generator, products: int) -> TraceEstimate:
    m = products // 2
    vectors = random_vectors(A, m, "rademacher", generator)
    image = A._matmat(vectors)
    check_finite(A, image)
    Q, S = leave_one_out(image.detach())
    Z = A.T._matmat(Q)
    check_finite(A, Z)
    # With P_i = Q (I - s_i s_i^T) Q^T, estimate i is diag(P_i A) + v_i * ((I - P_i) A v_i).
    R = Q.T @ image
    rest = image - Q @ (R - S * (S * R).sum(0))
    samples = (Q * Z).sum(1, keepdim=True) - (Q @ S) * (Z @ S) + vectors * rest
    return TraceEstimate(samples.mean(1), standard_error(samples), False, "xdiag", 2 * m)
