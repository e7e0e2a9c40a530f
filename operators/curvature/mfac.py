"""M-FAC: the empirical Fisher matrix of a sliding window of gradients, and its exact inverse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from operators.cost import Cost
from operators.curvature.empirical_fisher import EmpiricalFisher
from operators.linear_operator import LinearOperator, Scalar
from operators.precision import in_single
from operators.space import Space, Tree, check_tensor
from operators.structure import Structure
from operators.tracing import plainly, readable, tracked

# The m x m matrix is factorised in float64: its conditioning is that of the damped Fisher matrix.
WIDE = torch.float64


class MFACInverse(LinearOperator):
    """``(l I + G^T G / s)^-1 = (I - G^T (s l I + G G^T)^-1 G) / l`` for m rows G.

    Parameters
    ----------
    rows
        G, of shape ``(m, d)``.
    damping
        ``l > 0``, one number.
    divisor
        s; by default m, so that ``G^T G / s`` is a mean.
    space
        Space that it acts on; by default plain vectors ``(d,)``.
    gram
        ``G G^T`` where it is known already, of shape ``(m, m)``.

    Raises
    ------
    ValueError
        A shape does not fit, damping or divisor is not positive, or the m x m system is not
        positive definite in floating point: the damping is too small for the rows.
    TypeError
        The space has another dtype than the rows.

    Notes
    -----
    Built in ``2 m^2 d + m^3 / 3`` flops (without the first term where `gram` is given); a product
    costs ``4 m d + 2 m^2``; holds ``m d + m^2`` numbers.
    Relative to ``|x| / l`` products are accurate to rounding; what they keep of x within the span
    of large gradients is smaller by ``1 + |g|^2 / (s l)``, and so is its number of digits.

    Differentiable with respect to rows and damping. Source: Frantar, Kurtic and Alistarh (2021,
    arXiv:2107.03356), whose recursions compute the same numbers; here by a Cholesky factor, which
    rounding does not disturb.

    Examples
    --------
    >>> import torch
    >>> MFACInverse(torch.tensor([[2.0, 0.0]]), 1.0).to_dense()
    tensor([[0.2000, 0.0000],
            [0.0000, 1.0000]])
    """

    _parameters = ("rows", "damping")
    _transient = ("_factor",)

    # Versions of rows and damping, and the Cholesky factor for these.
    _factor: tuple[tuple[int, ...], Tensor] | None = None

    def __init__(
        self,
        rows: Tensor,
        damping: Scalar,
        divisor: float | None = None,
        *,
        space: Space | None = None,
        gram: Tensor | None = None,
    ) -> None:
        check_tensor(rows, "rows", "(m, d)")
        if rows.ndim != 2 or rows.shape[0] == 0:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; expected (m, d) with m >= 1")
        count, size = rows.shape
        space = space or Space.flat(size, rows.dtype, rows.device)
        if space.size != size:
            raise ValueError(f"rows has length {size}, but the space has size {space.size}")
        if space.dtype != rows.dtype:
            raise TypeError(f"the space has dtype {space.dtype}, but rows has {rows.dtype}")
        value = torch.as_tensor(damping, dtype=rows.dtype, device=rows.device)
        if value.ndim != 0 or (readable(value) and not bool(value > 0)):
            raise ValueError(f"damping={damping}; expected one number > 0")
        divisor = float(count if divisor is None else divisor)
        if not divisor > 0:
            raise ValueError(f"divisor={divisor}; expected > 0")
        if gram is not None and gram.shape != (count, count):
            raise ValueError(f"gram has shape {tuple(gram.shape)}; expected ({count}, {count})")
        super().__init__(space, space, Structure(positive_definite=True))
        self.rows, self.damping, self.divisor = rows, value, divisor
        moving = any(tracked(tensor) for tensor in (rows, value, gram) if tensor is not None)
        with nullcontext() if moving else plainly():
            factor, failed = torch.linalg.cholesky_ex(self._small(gram))
        if not moving:
            self._factor = self._versions(), factor
        if readable(failed) and int(failed):
            raise ValueError(
                f"the {count} x {count} system of the gradients is not positive definite: rows are "
                f"not finite, or damping={float(value):.3g} is too small for them in {rows.dtype}; "
                "raise it"
            )

    def _small(self, gram: Tensor | None = None) -> Tensor:
        """``K = s l I + G G^T``."""
        gram = self.rows @ self.rows.T if gram is None else gram
        eye = torch.eye(len(gram), dtype=WIDE, device=self.device)
        return gram.to(WIDE) + self.divisor * self.damping.to(WIDE) * eye

    def _cholesky(self) -> Tensor:
        """Cholesky factor of K; kept where it is numbers and nothing else."""
        if tracked(self.rows) or tracked(self.damping):
            return torch.linalg.cholesky(self._small())
        if self._factor is None or self._factor[0] != self._versions():
            with plainly():
                self._factor = self._versions(), torch.linalg.cholesky(self._small())
        return self._factor[1]

    def _versions(self) -> tuple[int, ...]:
        both = (self.rows, self.damping)
        return tuple(0 if t.is_inference() else t._version for t in both)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        inner = torch.cholesky_solve((self.rows @ block).to(WIDE), self._cholesky())
        return (block - self.rows.T @ inner.to(self.dtype)) / self.damping

    def _cost(self) -> Cost:
        count, size = self.rows.shape
        return Cost(flops=4 * count * size + 2 * count**2)

    def _describe(self) -> str:
        return (
            f"{len(self.rows)} gradients, damping {self.damping:.3g}"
            if readable(self.damping)
            else ""
        )

    def _exact_diagonal(self) -> Tensor:
        """``(1 - |L^-1 g_:j|^2) / l`` for ``K = L L^T``: m^2 d flops."""
        whitened = in_single(
            torch.linalg.solve_triangular,
            self._cholesky().to(self.dtype),
            self.rows,
            upper=False,
        )
        return (1 - whitened.square().sum(0)) / self.damping

    def _exact_trace(self) -> Tensor:
        """``(d - m + s l tr K^-1) / l``, since ``tr(K^-1 G G^T) = m - s l tr K^-1``."""
        count, size = self.rows.shape
        small = torch.cholesky_inverse(self._cholesky()).trace().to(self.dtype)
        return (size - count) / self.damping + self.divisor * small

    def _exact_logdet(self) -> Tensor:
        """``-(d - m) log l + m log s - log det K``."""
        count, size = self.rows.shape
        logdet = 2 * self._cholesky().diagonal().log().sum()
        scale = count * torch.log(logdet.new_tensor(self.divisor))
        return (scale - logdet).to(self.dtype) - (size - count) * self.damping.log()


class MFAC:
    """Window of the last m gradients: ``F = damping I + (1/s) sum_i g_i g_i^T`` and ``F^-1``.

    What `FisherStream` is to a growing sum with smoothing, this is to a fixed window that is
    solved with after every push: ``G G^T`` is kept, and a new gradient replaces one of its rows.

    Parameters
    ----------
    space
        Space of the parameters.
    window
        m: gradients kept; a further one replaces the oldest.
    damping
        ``> 0``, constant.
    mean_over
        ``"rows"``: s is the number of gradients there are. ``"window"``: s is m from the start, as
        published: F is too small until the window has filled.

    Raises
    ------
    ValueError
        Window or damping out of range.

    Notes
    -----
    A push costs ``2 m d`` flops, the first solve after it ``m^3 / 3 + 4 m d``, another ``4 m d``.
    Holds ``m d + m^2`` numbers; `operator` and `inverse` copy the ``m d`` (they stay what they
    are when more is pushed), `solve` does not.

    The rows were taken at different parameters; that is what makes the window cheap. Gradients
    pushed before they are solved with shrink themselves by ``1 / (1 + g^T F^-1 g / s)``, F being
    that without them.

    Source: Frantar, Kurtic and Alistarh (2021, arXiv:2107.03356).

    Examples
    --------
    >>> import torch
    >>> window = MFAC(Space.flat(2, torch.float32), window=8, damping=1.0)
    >>> window.push(torch.tensor([2.0, 0.0]))
    >>> window.solve(torch.tensor([5.0, 5.0]))
    tensor([1., 5.])
    """

    def __init__(
        self,
        space: Space,
        *,
        window: int,
        damping: float,
        mean_over: Literal["rows", "window"] = "rows",
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}; expected at least 1")
        if not damping > 0:
            raise ValueError(f"damping={damping}; expected > 0: m < d gradients are singular alone")
        if mean_over not in ("rows", "window"):
            raise ValueError(f"mean_over={mean_over!r}; expected 'rows' or 'window'")
        self.space, self.window, self.damping, self.mean_over = space, window, damping, mean_over
        self._rows = torch.zeros(window, space.size, dtype=space.dtype, device=space.device)
        self._gram = torch.zeros(window, window, dtype=WIDE, device=space.device)
        self.reset()

    def reset(self) -> None:
        """Forget every gradient."""
        self._pushed = 0
        self._current: MFACInverse | None = None

    def __len__(self) -> int:
        return min(self._pushed, self.window)

    @property
    def divisor(self) -> int:
        """s: what the sum of outer products is divided by."""
        return self.window if self.mean_over == "window" else len(self)

    def push(self, gradient: Tree, batch_size: int = 1) -> None:
        """Add the mean gradient of a batch; the oldest leaves a full window.

        Parameters
        ----------
        gradient
            Of the space, or flat ``(d,)``.
        batch_size
            B, the number of samples that the gradient is the mean of. The row is ``sqrt(B) g``:
            at a stationary point the mean of B independent scores has covariance ``F / B``.

        Raises
        ------
        ValueError
            Wrong shape or structure, a batch of less than one, or entries that are not finite.
        TypeError
            Wrong dtype or device.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; expected at least 1")
        row = self.space.coordinates(gradient, "gradient").detach() * batch_size**0.5
        slot = self._pushed % self.window
        count = min(self._pushed + 1, self.window)
        products = torch.cat(
            [self._rows[:slot] @ row, (row @ row)[None], self._rows[slot + 1 : count] @ row]
        )
        # Through the m products: one pass less over d, and overflow is caught too.
        if not bool(torch.isfinite(products).all()):
            raise ValueError("gradient is not finite, or its square overflows; it was not pushed")
        self._rows[slot] = row
        self._gram[slot, :count] = products.to(WIDE)
        self._gram[:count, slot] = products.to(WIDE)
        self._pushed += 1
        self._current = None

    def operator(self) -> EmpiricalFisher:
        """F as of now, damping included.

        Raises
        ------
        RuntimeError
            No gradient was pushed yet.
        """
        rows = self._held().clone()
        weights = rows.new_full((len(self),), 1.0 / self.divisor)
        return EmpiricalFisher(rows, self.damping, weights, space=self.space)

    def inverse(self) -> MFACInverse:
        """``F^-1`` as of now; raises as `operator` does, and as `MFACInverse`."""
        return self._inverse(self._held().clone())

    def solve(self, v: Tree) -> Tree:
        """``F^-1 v``: the product with `inverse`, without copying the window."""
        rows = self._held()
        if self._current is None:
            self._current = self._inverse(rows)
        return self._current @ v

    def _inverse(self, rows: Tensor) -> MFACInverse:
        count = len(self)
        gram = self._gram[:count, :count]
        return MFACInverse(rows, self.damping, self.divisor, space=self.space, gram=gram)

    def _held(self) -> Tensor:
        if self._pushed == 0:
            raise RuntimeError("no gradient was pushed: nothing to average yet")
        return self._rows[: len(self)]
