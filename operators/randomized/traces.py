"""The trace of an operator: from its structure, by n products, or estimated from fewer."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from operators.linear_operator import LinearOperator
from operators.precision import in_single
from operators.randomized.monte_carlo import (
    Probes,
    TraceEstimate,
    check_arguments,
    check_count,
    check_finite,
    exact_diagonal,
    random_vectors,
    refined,
    standard_error,
)


def trace(
    A: LinearOperator,
    products: int = 60,
    *,
    method: Literal["exact", "hutchinson", "hutch++", "xtrace"] | None = None,
    probes: Probes | None = None,
    rtol: float | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    r"""``tr A = sum_i A_ii``, with an estimate of its error.

    Parameters
    ----------
    A
        Square operator; symmetry is not needed.
    products
        Products to spend, not counting those of earlier attempts under `rtol`.
    method
        ``"exact"``: from the structure, or else by n products. ``"hutchinson"``: the mean of
        ``v^T A v``; its error falls as ``|A|_F / sqrt(products)``. ``"hutch++"``: the trace on the
        range of a sketch, and Hutchinson on the rest. ``"xtrace"``: the same with each test vector
        serving for the sketch of all the others. By default what the structure gives; else n
        products where the budget allows them; else XTrace.
    probes
        Distribution of the test vectors. By default ``"sphere"`` for XTrace, ``"rademacher"`` for
        the others. With ``"sphere"`` XTrace and Hutch++ put what is left of a vector off the sketch
        back onto the sphere of that space, which removes the variance of its length.
    rtol
        Double `products` until ``error <= rtol |value|``; ends with n products at the latest.
    max_products
        Limit of the sum of all attempts under `rtol`.
    generator
        Of random numbers; by default one seeded with 0: two calls take the same test vectors.

    Returns
    -------
    TraceEstimate
        The value, a scalar tensor, is in `value`.

    Raises
    ------
    ValueError
        A is not square, a product is not finite, or a setting is out of range.
    TypeError
        A is no operator, or `products` no integer.

    Warns
    -----
    RuntimeWarning
        `max_products` ended the search before `rtol` was met.

    Notes
    -----
    All estimators are unbiased. Where the eigenvalues decay, Hutch++ and XTrace are far better than
    Hutchinson (errors ``O(1/products)`` in place of ``O(1/sqrt(products))``; exponential decay is
    followed), and exact to rounding for rank below a third or half of the budget. On a flat
    spectrum Hutchinson is best by a small factor. Holds ``n products`` numbers.

    XTrace's samples share vectors, so that their spread understates its error: on small matrices of
    flat, algebraic and exponential spectra `error` was 0.66 to 0.89 of the true standard error
    (n = 80, 36 products), that of the others 0.97 to 1.03.

    Derivatives: given its vectors, each estimator is linear in A, and the basis of the sketch is
    held constant; then the derivative is the same estimator of ``tr(dA)``, also unbiased, of any
    order. Its error is not that in `error`.

    Under ``torch.func.vmap`` all operators get the same vectors; `rtol` is refused there.

    Source: Hutchinson (1990); Meyer, Musco, Musco and Woodruff (2021, arXiv:2010.09649, Algorithm
    1); Epperly, Tropp and Webber (2024, arXiv:2301.07825, sections 2 and 3, the improved version).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
    >>> trace(A)
    TraceEstimate(value=tensor(5.), error=tensor(0.), exact=True, method='structure', products=0)
    >>> U = ops.Dense(torch.ones(200, 1) / 10)
    >>> t = trace(U @ U.T, 12)
    >>> t.value.round(decimals=3), t.method, t.products
    (tensor(2.), 'xtrace', 12)
    """
    estimators = {"hutchinson": _hutchinson, "hutch++": _hutch_pp, "xtrace": _xtrace}
    check_arguments(A, method, ("exact", *estimators), rtol, max_products)
    # Fewer would give no spread to estimate the error from.
    check_count(
        "products", products, {"hutchinson": 2, "hutch++": 6, "xtrace": 4}.get(str(method), 1)
    )
    n = A.shape[0]
    if method in (None, "exact"):
        known = A._exact_trace()
        if known is not None:
            return TraceEstimate.known(known, "structure", 0)
        if method == "exact" or products >= n:
            return _exact(A)
        method = "xtrace"
        check_count("products", products, 4)
    if method != "hutchinson" and products >= 2 * n:
        raise ValueError(
            f"products={products} for {A!r} sketch more than there is; "
            f"method='exact' costs {n} products"
        )
    probes = probes or ("sphere" if method == "xtrace" else "rademacher")
    generator = generator or torch.Generator(A.device).manual_seed(0)
    return refined(
        partial(estimators[str(method)], A, probes, generator),
        (products,),
        lambda plan, _: (2 * plan[0],),
        partial(_exact, A),
        n,
        rtol,
        max_products,
    )


def _exact(A: LinearOperator) -> TraceEstimate:
    diagonal = exact_diagonal(A)
    return TraceEstimate.known(diagonal.value.sum(), "exact", diagonal.products)


def _hutchinson(
    A: LinearOperator, probes: Probes, generator: torch.Generator, products: int
) -> TraceEstimate:
    vectors = random_vectors(A, products, probes, generator)
    image = A._matmat(vectors)
    check_finite(A, image)
    return _mean((vectors * image).sum(0), "hutchinson", products)


def _hutch_pp(
    A: LinearOperator, probes: Probes, generator: torch.Generator, products: int
) -> TraceEstimate:
    k = products // 3
    sketch = A._matmat(random_vectors(A, k, probes, generator)).detach()
    check_finite(A, sketch)
    Q = in_single(torch.linalg.qr, sketch).Q
    vectors = random_vectors(A, products - 2 * k, probes, generator)
    rest = vectors - Q @ (Q.T @ vectors)
    image = A._matmat(torch.cat([Q, rest], dim=1))
    check_finite(A, image)
    quadratic = (rest * image[:, k:]).sum(0)
    if probes == "sphere":
        quadratic = quadratic * (A.shape[0] - k) / rest.square().sum(0)
    return _mean((Q * image[:, :k]).sum() + quadratic, "hutch++", products)


def _xtrace(
    A: LinearOperator, probes: Probes, generator: torch.Generator, products: int
) -> TraceEstimate:
    m = products // 2
    vectors = random_vectors(A, m, probes, generator)
    image = A._matmat(vectors)
    check_finite(A, image)
    Q, S = leave_one_out(image.detach())
    Z = A._matmat(Q)
    check_finite(A, Z)
    # With the projector P_i = Q (I - s_i s_i^T) Q^T onto what the other vectors saw, estimate i is
    # tr(P_i A P_i) + u_i^T A u_i, u_i = (I - P_i) v_i, and A u_i = A v_i - (A Q) (Q^T P_i v_i).
    W = Q.T @ vectors
    C = W - S * (S * W).sum(0)
    rest = vectors - Q @ C
    quadratic = (rest * (image - Z @ C)).sum(0)
    if probes == "sphere":
        quadratic = quadratic * (A.shape[0] - m + 1) / rest.square().sum(0)
    seen = (Q * Z).sum() - ((Q @ S) * (Z @ S)).sum(0)
    return _mean(seen + quadratic, "xtrace", 2 * m)


def leave_one_out(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Q and unit columns ``s_i`` such that ``Q (I - s_i s_i^T) Q^T`` projects onto Y less column i.

    Q is an orthonormal basis of the range of Y ``(n, m)``. From ``Y = Q R``, ``s_i`` is orthogonal
    to all columns of R but the i-th: the i-th column of ``R^-T``, normalised (Epperly, Tropp and
    Webber, 2024, section 2.2).
    """
    lengths = Y.norm(dim=0)
    Q, R = in_single(torch.linalg.qr, Y / torch.where(lengths > 0, lengths, 1))
    # A dependent column leaves zero or rounding on the diagonal. Moving it by rounding keeps R
    # invertible; the bases then hold a direction more, which no estimate minds.
    pivots = R.diagonal()
    eps = torch.finfo(Y.dtype).eps
    shift = torch.where(pivots.abs() < eps, eps, 0).to(Y.dtype)
    eye = torch.eye(R.shape[1], dtype=Y.dtype, device=Y.device)
    S = in_single(torch.linalg.solve_triangular, (R + torch.diag_embed(shift)).T, eye, upper=False)
    # In two steps, since the square of a large entry may overflow.
    S = S / S.abs().amax(0)
    return Q, S / S.norm(dim=0)


def _mean(samples: Tensor, method: str, products: int) -> TraceEstimate:
    return TraceEstimate(samples.mean(), standard_error(samples), False, method, products)
