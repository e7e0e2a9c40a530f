"""The empirical Fisher matrix in factor form, from a batch or streamed along a trajectory.

A gradient (score) g contributes ``g g^T``; the rows are kept, the d x d matrix is not:

    F = l I + sum_t w_t g_t g_t^T .

Storage is ``T d`` numbers instead of ``d^2``, and a solve a T x T system (`solvers.Woodbury`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from operators.curvature.batch import batch_size, check_chunk_size
from operators.curvature.likelihood import Likelihood, likelihood_of
from operators.curvature.module import as_function
from operators.curvature.scores import Model, observed_scores, pulled_back, scale_of_rows
from operators.linear_operator import Scalar
from operators.low_rank import LowRankPlusDiagonal
from operators.precision import in_single
from operators.space import Space, Tree, check_tensor
from operators.tracing import readable


class EmpiricalFisher(LowRankPlusDiagonal):
    """``F = damping I + sum_t w_t g_t g_t^T`` from gradients with the labels that were observed.

    Rows are gradients of single samples. That of a mean loss over B samples has the second moment
    ``F / B`` where its mean is zero: push it scaled by ``B^(1/2)``.

    It equals the Hessian of a negative log-likelihood only at the minimum of a well-specified
    model with unit sample weights; elsewhere it is a surrogate (Kunstner, Hennig and Balles, 2019,
    arXiv:1905.12558). `damping` is part of the operator and stays visible.

    Parameters
    ----------
    gradients
        Rows ``g_t``, of shape ``(T, d)``.
    damping
        ``l >= 0``, one number.
    weights
        ``w_t``, of shape ``(T,)``; by default ``1 / T``.
    space
        Space of the parameters; by default plain vectors ``(d,)``.

    Raises
    ------
    ValueError
        A shape does not fit, or damping is negative or not one number.

    Examples
    --------
    >>> import torch
    >>> F = EmpiricalFisher(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), damping=0.5)
    >>> F.to_dense()
    tensor([[1.0000, 0.0000],
            [0.0000, 2.5000]])
    """

    def __init__(
        self,
        gradients: Tensor,
        damping: Scalar = 0.0,
        weights: Tensor | None = None,
        *,
        space: Space | None = None,
    ) -> None:
        check_tensor(gradients, "gradients", "(T, d)")
        if weights is None and gradients.ndim == 2:
            count = gradients.shape[0]
            weights = gradients.new_full((count,), 1.0 / max(count, 1))
        super().__init__(gradients, damping, weights, space=space)
        d = self.diagonal_values
        if d.ndim != 0 or (readable(d) and not bool(d >= 0)):
            raise ValueError(f"damping={damping}; expected one number >= 0")

    @classmethod
    def from_samples(
        cls,
        sample_loss: Callable[[Tree, Tree], Tensor],
        y: Tree,
        samples: Tree,
        damping: Scalar = 0.0,
        *,
        chunk_size: int | None = None,
    ) -> EmpiricalFisher:
        """``(1/B) sum_i grad l_i grad l_i^T`` over the B samples of a batch.

        Parameters
        ----------
        sample_loss
            ``l(y, sample)``, the negative log-likelihood of one sample, a scalar.
        y
            Parameters.
        samples
            Nested tensors with a leading axis of length B.
        damping
            ``l >= 0``.
        chunk_size
            Samples whose gradients are computed at once, which bounds what the sweeps hold.

        Raises
        ------
        ValueError
            The batch is empty or not one, or a setting is out of range.

        Notes
        -----
        One vmapped gradient; holds ``B d`` numbers.
        """
        space = Space.of(y, "y")
        batch_size(samples, "samples")
        check_chunk_size(chunk_size)

        def score(sample: Tree) -> Tensor:
            return space.ravel(torch.func.grad(sample_loss)(y, sample))

        scores = torch.func.vmap(score, chunk_size=chunk_size)(samples)
        return EmpiricalFisher(scores, damping, space=space)

    @classmethod
    def from_model(
        cls,
        model: nn.Module | Model,
        likelihood: str | nn.Module | Likelihood,
        y: Tree | None,
        inputs: Tree,
        targets: Tensor,
        *,
        weights: Tensor | None = None,
        root_weights: bool = False,
        chunk_size: int | None = None,
        damping: Scalar = 0.0,
    ) -> EmpiricalFisher:
        """``(1/M) sum_n (w_n g_n) (w_n g_n)^T`` with the scores of a batch with labels.

        Parameters
        ----------
        model, likelihood, y, inputs
            As for `Fisher`, whose scale this has: M counts the N samples, times the positions
            where each has several.
        targets
            The labels that were observed, as the likelihood has them.
        weights
            ``w_n >= 0``, of shape ``(N,)``: those of the samples in the loss
            ``(1/N) sum_n w_n l_n``; by default ones.
        root_weights
            False: a row is the gradient of ``w_n l_n`` and counts as ``w^2 g g^T``, which plays
            down what the weights play down. True: ``w g g^T``, each score scaled by
            ``w^(1/2)``, as the Hessian of the weighted loss has it. Where the labels follow the
            model only the latter is that Hessian; where many are wrong neither is.
        chunk_size
            Samples whose gradients are computed at once; the rows are held in any case.
        damping
            ``l >= 0``; the Hessian ``2 c`` of a penalty ``c |y|^2`` belongs here, not in the
            scores.

        Raises
        ------
        ValueError, TypeError
            As `Fisher`, or the targets do not fit the outputs.

        Notes
        -----
        One run of the model and one vmapped gradient; holds ``N d`` numbers. Differentiable with
        respect to y, floating inputs and targets, and weights.

        Examples
        --------
        >>> import torch
        >>> x, t = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [1.0]])
        >>> F = EmpiricalFisher.from_model(
        ...     lambda w, x: x @ w, "gaussian", torch.zeros(2, 1), x, t, damping=0.5
        ... )
        >>> F.to_dense()
        tensor([[1.0000, 0.0000],
                [0.0000, 2.5000]])
        """
        likelihood = likelihood_of(likelihood)
        function, point = as_function(model, y)
        space = Space.of(point, "y")
        check_chunk_size(chunk_size)
        scale = scale_of_rows(weights, batch_size(inputs, "inputs"), space, root_weights)
        scores = observed_scores(function, likelihood, point, inputs, targets)
        rows = pulled_back(function, likelihood, point, inputs, scores, chunk_size)
        return EmpiricalFisher(rows[:, 0], damping, scale / scores.shape[2], space=space)

    @property
    def damping(self) -> Tensor:
        """``l``, the multiple of the identity that is inside the operator."""
        return self.diagonal_values

    def effective_rank(self) -> float:
        """``sum_i s_i / (s_i + l)``: how many directions the gradients hold above the damping.

        `s_i` are the eigenvalues of ``sum_t w_t g_t g_t^T``. Off their span the operator is the
        damping alone, and its inverse a multiple of the identity. Costs ``T^2 d``.
        """
        scaled = self.weights.clamp_min(0).sqrt()[:, None] * self.rows
        eigenvalues = in_single(torch.linalg.eigvalsh, scaled @ scaled.T).clamp_min(0)
        if not bool(self.diagonal_values > 0):
            # What is zero comes out as rounding error, of either sign.
            largest = float(eigenvalues.max()) if len(eigenvalues) else 0.0
            noise = largest * max(self.rows.shape) * torch.finfo(self.dtype).eps
            return float((eigenvalues > noise).sum())
        return float((eigenvalues / (eigenvalues + self.diagonal_values)).sum())


class FisherStream:
    """Empirical Fisher of a stream of gradients: the state of NHGD, in factor form.

    With ``rho = None`` (exact mean) the operator after T gradients is

        F = (damping + initial / (T+1)) I + (1 / (T + [initial > 0])) sum_t g_t g_t^T ,

    and with smoothing ``0 < rho < 1``

        F = (damping + (1-rho)^T initial) I + sum_t rho (1-rho)^(T-t) g_t g_t^T .

    `initial` is the ``H_0 = initial I`` of the recursions in the paper, which the average dilutes
    or forgets; `damping` stands outside the average and never decays, so that the inverse stays
    below ``1 / damping`` in directions that no gradient excites ("wind-up").

    Parameters
    ----------
    space
        Space of the parameters.
    damping
        ``>= 0``, constant.
    initial
        ``>= 0``: the pseudo-sample ``H_0``.
    rho
        Smoothing factor in (0, 1), or None for the exact mean.
    window
        Keep at most this many gradients, newest first; None keeps all. Under the exact mean
        the mean is then over the window; under smoothing, what is dropped carries less than
        ``(1-rho)^window`` of the mass.

    Raises
    ------
    ValueError
        A setting out of range, or damping and initial both zero.

    Notes
    -----
    A push costs O(d), the state ``T d`` numbers. Source: natural hypergradient descent
    (arXiv:2602.10905, eq. 3.2), whose dense recursions are `solvers.InverseRecursion`.

    Examples
    --------
    >>> import torch
    >>> stream = FisherStream(Space.flat(2, torch.float32), damping=1.0)
    >>> stream.push(torch.tensor([2.0, 0.0]))
    >>> stream.operator().to_dense()
    tensor([[5., 0.],
            [0., 1.]])
    """

    def __init__(
        self,
        space: Space,
        *,
        damping: float,
        initial: float = 0.0,
        rho: float | None = None,
        window: int | None = None,
    ) -> None:
        if not (damping >= 0 and initial >= 0 and damping + initial > 0):  # NaN lands here too
            raise ValueError(
                f"damping={damping} and initial={initial}; expected both >= 0 and one > 0, "
                "since T < d gradients alone give a singular matrix"
            )
        if rho is not None and not 0 < rho < 1:
            raise ValueError(f"rho={rho}; expected 0 < rho < 1, or None for the exact mean")
        if window is not None and window < 1:
            raise ValueError(f"window={window}; expected at least 1, or None to keep all")
        self.space, self.damping, self.initial = space, damping, initial
        self.rho, self.window = rho, window
        self.reset()

    def reset(self) -> None:
        """Forget every gradient and start again from ``H_0``."""
        self._rows: list[Tensor] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._rows)

    def state(self) -> dict[str, Any]:
        """The gradients ``(T, d)``, and how many were pushed in all."""
        empty = torch.zeros(0, self.space.size, dtype=self.space.dtype, device=self.space.device)
        return {"rows": torch.stack(self._rows) if self._rows else empty, "pushed": self._pushed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, of a stream with the same settings."""
        rows = state["rows"].to(dtype=self.space.dtype, device=self.space.device)
        self._rows, self._pushed = list(rows.unbind()), int(state["pushed"])

    def push(self, gradient: Tree) -> None:
        """Add one gradient, already scaled (batch factor and sample weight enter here).

        Parameters
        ----------
        gradient
            Of the space, or flat ``(d,)``.

        Raises
        ------
        ValueError
            Wrong shape or structure.
        TypeError
            Wrong dtype or device.
        """
        # A copy: callers reuse their gradient buffers, zero_grad() among them.
        row = self.space.coordinates(gradient, "gradient").detach().clone()
        self._rows.append(row)
        self._pushed += 1
        if self.window is not None and len(self._rows) > self.window:
            del self._rows[0]

    def operator(self) -> EmpiricalFisher:
        """The operator as of now.

        Raises
        ------
        RuntimeError
            The stream is empty and has no `initial`: there is nothing to average yet.
        """
        count = len(self._rows)
        if count == 0 and self.initial == 0:
            raise RuntimeError("no gradient was pushed and initial is 0: nothing to average")
        dtype, device = self.space.dtype, self.space.device
        if self.rho is None:
            samples = count + (self.initial > 0)
            weights = torch.full((count,), 1.0 / samples, dtype=dtype, device=device)
            floor = self.initial / samples
        else:
            age = torch.arange(count - 1, -1, -1, dtype=dtype, device=device)
            weights = self.rho * (1.0 - self.rho) ** age
            floor = self.initial * (1.0 - self.rho) ** self._pushed
        rows = (
            torch.stack(self._rows)
            if self._rows
            else torch.zeros(0, self.space.size, dtype=dtype, device=device)
        )
        return EmpiricalFisher(rows, self.damping + floor, weights, space=self.space)
