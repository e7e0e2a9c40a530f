"""`GaussNewton`: the generalised Gauss-Newton matrix of a loss of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from operators.curvature.batch import batch_size, check_chunk_size, chunks
from operators.curvature.model_curvature import ModelCurvature, checked_damping
from operators.curvature.module import as_function
from operators.curvature.output_hessian import HalfSquare, output_hessian
from operators.linear_operator import Scalar
from operators.space import Space, Tree


@dataclass(frozen=True)
class _Unpacking:
    """``f(u, args)`` of ``residual(u, *args)``; equal for one residual."""

    residual: Callable[..., Tree]

    def __call__(self, u: Tree, args: tuple[Any, ...]) -> Tree:
        return self.residual(u, *args)


class GaussNewton(ModelCurvature):
    """``A = J^T H J + damping I``: the Hessian of a mean loss with the model made linear.

    J is the Jacobian of the outputs for the whole batch with respect to y, H the Hessian of the
    loss with respect to the outputs. For a loss ``(1/N) sum_n l(z_n, t_n)`` that is
    ``(1/N) sum_n J_n^T H_n J_n``. It lacks ``sum_n <grad l, model''>`` of the Hessian, is
    semidefinite where the loss is convex in the outputs, and equals the Hessian of a model that is
    linear in y.

    Parameters
    ----------
    model
        ``model(y, inputs)``, or a `torch.nn.Module`, whose positional arguments a tuple of inputs
        is. The outputs are tensors with N samples on axis 0.
    loss
        ``loss(outputs, targets)``, a scalar: the mean over the samples (a sum where it has an
        attribute ``reduction`` that says ``"sum"``). `torch.nn.CrossEntropyLoss`,
        `torch.nn.MSELoss`, `torch.nn.BCEWithLogitsLoss` with all their settings, and their names
        ``"cross-entropy"``, ``"mse"``, ``"binary-cross-entropy"``, have H in closed form. As in
        torch, the mean of the last two is over all entries of the outputs.
    y
        Point: a tensor or nested structure; None for the parameters of a module that require
        gradients (without their history: derivatives are those with respect to y).
    inputs, targets
        The batch: nested tensors with a leading axis of length N.
    chunk_size
        Samples that go through the model at once, for memory; None for all, which is faster. The
        result is the same: means are over the whole batch.
    damping
        ``>= 0``. The operator includes it.
    convex
        That the loss is convex in the outputs. It is known of the three losses above (with
        settings and targets that are not negative), and a claim about others, probed at the first
        use. False where it is not: A is then symmetric, and no more.

    Attributes
    ----------
    damping
        The multiple of the identity that is inside the operator; a scalar tensor if it was given
        as one.

    Raises
    ------
    ValueError
        A shape does not fit, the batch is empty, a setting is out of range, the loss is no scalar,
        a class does not exist, or the module couples samples or draws random numbers (training
        mode of BatchNorm, dropout).
    TypeError
        Something is of another kind or dtype than expected.
    FalseClaimError
        At the first use: the loss is not convex.

    Notes
    -----
    ``A v = J^T (H (J v))``. For cost and memory see `ModelCurvature`. Differentiable with respect
    to y, floating inputs and targets, the weights of a loss of torch.nn, and damping. Source:
    Schraudolph (2002, doi:10.1162/08997660260028683, section 3); Martens (2014, arXiv:1412.1193,
    section 8).

    Examples
    --------
    >>> import torch
    >>> x, t = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2, 1)
    >>> A = GaussNewton(lambda w, x: x @ w, "mse", torch.zeros(2, 1), x, t)
    >>> A.to_dense()  # 2 x^T x / 2
    tensor([[2., 2.],
            [2., 4.]])
    """

    _parameters: ClassVar[tuple[str, ...]] = ("y", "inputs", "targets", "loss", "damping")

    def __init__(
        self,
        model: nn.Module | Callable[[Tree, Tree], Tree],
        loss: str | Callable[[Tree, Tree], Tensor],
        y: Tree | None,
        inputs: Tree,
        targets: Tree,
        *,
        chunk_size: int | None = None,
        damping: Scalar = 0.0,
        convex: bool = True,
    ) -> None:
        self.loss, self.targets = output_hessian(loss), targets
        function, point = as_function(model, y)
        checked_damping(damping, Space.of(point, "y"))
        check_chunk_size(chunk_size)
        batch_size(inputs, "inputs")
        batch_size((inputs, targets), "inputs and targets")
        with torch.no_grad():
            first = next(chunks((inputs, targets), chunk_size))
            outputs = function(point, first[0])
            batch_size((outputs, first[1]), "the model's outputs and the targets")
            self.loss.check(outputs, first[1])
            known = self.loss.positive_semidefinite(targets)
        super().__init__(
            model,
            y,
            inputs,
            damping=damping,
            chunk_size=chunk_size,
            positive_semidefinite=known or convex,
            claims=("positive_semidefinite",) if convex and not known else (),
        )

    @classmethod
    def from_residual(
        cls, residual: Callable[..., Tree], u: Tree, *args: Any, damping: Scalar = 0.0
    ) -> GaussNewton:
        """``J^T J + damping I`` of a residual: the Gauss-Newton matrix of ``|residual|^2 / 2``.

        Parameters
        ----------
        residual
            ``residual(u, *args)``, a tensor or nested structure; no mean is taken.
        u
            Point.
        *args
            What else it depends on; tensors here are parameters of the operator.
        damping
            ``>= 0``: that of Levenberg and Marquardt. The operator includes it.

        Raises
        ------
        ValueError, TypeError
            As the constructor does.

        Examples
        --------
        >>> import torch
        >>> A = GaussNewton.from_residual(lambda u: u**2 - 2.0, torch.tensor([1.0, 3.0]))
        >>> A.to_dense()
        tensor([[ 4.,  0.],
                [ 0., 36.]])
        """
        operator = object.__new__(cls)
        operator.loss, operator.targets = HalfSquare(), None
        ModelCurvature.__init__(
            operator,
            _Unpacking(residual),
            u,
            args,
            damping=damping,
            chunk_size=None,
            positive_semidefinite=True,
        )
        return operator

    def _shares(self) -> Tree:
        return self.loss.shares(self.targets, self.dtype)

    def _curve(self, outputs: Tree, tangent: Tree, share: Tree, fraction: float) -> Tree:
        return self.loss.product(outputs, tangent, share, fraction)
