"""`KFAC`: Kronecker-factored curvature of a neural network, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from operators.cost import Cost
from operators.curvature.eigenbases import Eigenbases
from operators.curvature.kronecker_factors import FactorEstimator, Factors, FisherKind
from operators.curvature.layer_matrices import LayerMatrices
from operators.curvature.likelihood import Likelihood
from operators.curvature.weight_sharing import WeightSharing
from operators.elementary import Diagonal
from operators.inverse import Inverse
from operators.linear_operator import LinearOperator, Scalar
from operators.precision import in_single
from operators.space import Space, Tree
from operators.structure import Structure
from operators.tracing import readable

DampingStyle = Literal["factored", "tikhonov"]


class KFAC(LinearOperator):
    """``A = diag_l (S_l (x) A_l)``, damped: for each layer the map ``V -> S V A`` of its matrix.

    V has the shape of the weight ``W`` ``(p, d)`` of the layer, with the bias as its last column;
    ``(S (x) A) vec(V) = vec(S V A)`` for the row-major vec, S and A symmetric. The kernel of a
    convolution ``(o, c, h, w)`` is the matrix ``(o, c h w)``, and its G groups are layers of their
    own. Curvature between layers is left out.

    Parameters
    ----------
    factors
        ``{layer: (S, A)}`` of symmetric positive semidefinite matrices ``(p, p)`` and ``(d, d)``,
        or of stacks ``(G, p, p)`` and ``(G, d, d)`` for G groups. `from_module` computes them.
    space
        Space of the parameters: a dictionary with ``"layer.weight"`` and ``"layer.bias"``, either
        or both of them, for each layer (``"weight"``, ``"bias"`` for the layer ``""``).
    damping
        ``l >= 0``, one number; it is inside the operator.
    damping_style
        ``"factored"``: ``(S + l^(1/2) / pi I) (x) (A + pi l^(1/2) I)`` with
        ``pi^2 = (tr A / d) / (tr S / p)``, which stays a Kronecker product.
        ``"tikhonov"``: ``S (x) A + l I``.

    Attributes
    ----------
    factors
        ``{layer: Factors(S, A)}``, without damping.
    damping
        ``l``.
    damping_style
        As given.

    Raises
    ------
    ValueError
        A shape does not fit; a factor is not symmetric, or not finite; damping is negative or not
        one number; a parameter has no factors.
    TypeError
        `space` is not that of a dictionary; a factor has another dtype or device.

    Notes
    -----
    A product costs ``2 p d (p + d)`` flops for each layer, the factors ``p^2 + d^2`` numbers. It is
    differentiable in the factors and the damping; but with factored damping the square root has no
    derivative at ``l = 0``, and zero is what is given there.

    A and S are means over samples: A is in units of the mean loss, whatever the batch. Scaling A up
    and S down leaves the operator as it is, with its damping, by the choice of pi.

    Source: Martens and Grosse (2015, arXiv:1503.05671), sections 3 and 6.3 (damping, pi);
    convolutions: Grosse and Martens (2016, arXiv:1602.01073); weight sharing: Eschenhagen et al.
    (2023, arXiv:2311.00636).

    Examples
    --------
    >>> import torch
    >>> S, A = torch.tensor([[2.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> space = Space.of({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    >>> K = KFAC({"": (S, A)}, space, damping=0.5, damping_style="tikhonov")
    >>> K @ {"weight": torch.tensor([[1.0]]), "bias": torch.tensor([2.0])}
    {'weight': tensor([[4.5000]]), 'bias': tensor([6.])}
    >>> K.inverse() @ torch.tensor([4.5, 6.0])
    tensor([1.0000, 2.0000])
    """

    _parameters = ("factors", "damping")
    _unread = (*LinearOperator._unread, "_layout")

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        space: Space,
        damping: Scalar = 0.0,
        *,
        damping_style: DampingStyle = "factored",
    ) -> None:
        self._build(factors, space, damping, damping_style, moments=False)

    def _build(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        space: Space,
        damping: Scalar,
        damping_style: DampingStyle,
        *,
        moments: bool,
    ) -> None:
        """Of second moments it is known that they are symmetric and semidefinite."""
        level = torch.as_tensor(damping, dtype=space.dtype, device=space.device)
        if level.ndim != 0 or (readable(level) and not bool(level >= 0)):  # NaN lands here too
            raise ValueError(f"damping={damping}; expected one number >= 0")
        if damping_style not in ("factored", "tikhonov"):
            raise ValueError(f"damping_style={damping_style!r}; expected 'factored' or 'tikhonov'")
        definite = readable(level) and bool(level > 0)
        fact = "positive_definite" if definite else "positive_semidefinite"
        LinearOperator.__init__(self, space, space, Structure(**{fact: True}))
        self._claims = () if moments else (fact,)
        self.factors = {name: Factors(*pair) for name, pair in factors.items()}
        self.damping, self.damping_style = level, damping_style
        self._layout = LayerMatrices.of(self.factors, space, moments=moments)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        inputs: Tree,
        targets: Tensor | None = None,
        *,
        fisher: FisherKind = "type-2",
        weight_sharing: WeightSharing = "expand",
        parameters: Iterable[str] | None = None,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        damping: Scalar = 0.0,
        damping_style: DampingStyle = "factored",
    ) -> KFAC:
        """K-FAC of a module on a batch.

        Parameters
        ----------
        module
            A network; the parameters that are included belong to Linear and Conv2d layers. Its
            outputs are ``(N, C)``, or with more terms of the loss for each sample ``(N, C, ...)``
            (categorical: classes on axis 1) or ``(N, ..., C)``.
        likelihood
            ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, a `Likelihood`, or the loss:
            `CrossEntropyLoss`, `BCEWithLogitsLoss`, `MSELoss` with the mean as reduction.
        inputs
            Of the module, samples first: a tensor, a tuple of arguments, or a dictionary of them.
        targets
            Observed labels; only ``fisher="empirical"`` looks at them.
        fisher
            What S is the second moment of. ``"type-2"``: the scores of labels of the model, in
            expectation, by sending back the columns of a root of the Hessian of the loss in the
            outputs. ``"mc"``: scores of `mc_samples` labels drawn from the model for each term.
            ``"empirical"``: scores of the targets (the scores of a sample's terms summed).
            ``"forward-only"``: ``S = I`` (Benzing, 2022, arXiv:2201.12250).
        weight_sharing
            ``"expand"``: positions of a sample (of a convolution; of the extra axes of a Linear
            layer) count as samples. ``"reduce"``: inputs are averaged, scores summed over
            positions first.
        parameters
            Names of parameters, or of modules to include with all that is beneath; by default
            every parameter that requires gradients.
        mc_samples
            Labels drawn for each term.
        generator
            Of the labels; by default one seeded with 0.
        damping, damping_style
            As for the class.

        Raises
        ------
        ValueError, TypeError
            As `FactorEstimator` and its call.

        Notes
        -----
        One forward pass, and one pass back through the layers for each column: ``C - 1`` of them
        for ``"type-2"`` and a categorical likelihood, C for others (for each term of a sample
        apart), `mc_samples` for ``"mc"``, one for ``"empirical"``. The factors are constants: no
        derivative passes through their computation. The module stays as it was.

        Examples
        --------
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> KFAC.from_module(net, "gaussian", x).to_dense()
        tensor([[1., 1.],
                [1., 2.]])
        """
        estimator = FactorEstimator(
            module,
            likelihood,
            fisher=fisher,
            weight_sharing=weight_sharing,
            parameters=parameters,
            mc_samples=mc_samples,
            generator=generator,
        )
        factors, _ = estimator(inputs, targets)
        return cls._of_estimates(factors, estimator.space, damping, damping_style=damping_style)

    @classmethod
    def _of_estimates(
        cls,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        space: Space,
        damping: Scalar = 0.0,
        *,
        damping_style: DampingStyle = "factored",
    ) -> KFAC:
        """K-FAC of factors that are second moments: semidefinite by construction, not tried."""
        operator = object.__new__(cls)
        operator._build(factors, space, damping, damping_style, moments=True)
        return operator

    @property
    def block_diagonal(self) -> bool:
        """True: a block for each layer."""
        return True

    def damped_factors(self) -> dict[str, Factors]:
        """``{layer: (S + l^(1/2) / pi I, A + pi l^(1/2) I)}``: what factored damping makes of them.

        Raises
        ------
        ValueError
            The damping is Tikhonov's, which is inside no factor.
        """
        if self.damping_style != "factored":
            raise ValueError(
                f"{self!r} has damping_style='tikhonov': S (x) A + l I is no Kronecker product"
            )
        return {name: pair.damped(self.damping) for name, pair in self.factors.items()}

    def inverse(self) -> KFAC | Inverse:
        """``A^-1``, exact and differentiable.

        With factored damping a `KFAC` of the inverse factors, ``S^-1 (x) A^-1``, by Cholesky. With
        Tikhonov's ``U ((U^T V W) / (s a^T + l)) W^T`` by the eigenvectors U, W and eigenvalues s, a
        of S and A, taken once.

        Raises
        ------
        ValueError
            A factor is singular to working precision, the damping included.
        """
        undamped = readable(self.damping) and not bool(self.damping > 0)
        if self.damping_style == "tikhonov" and not undamped:
            return Inverse(self, Eigenbases())
        pairs = self.factors if undamped else self.damped_factors()
        inverses = {name: pair.inverse(name) for name, pair in pairs.items()}
        inverse = KFAC._of_estimates(inverses, self.domain)
        inverse.structure = self.structure.inverse()
        return inverse

    def _act(self, name: str, V: Tensor) -> Tensor:
        """``S V A`` with the damping, for matrices V of a layer ``(..., p, d)``."""
        pair = self.factors[name]
        S, A = pair
        if self.damping_style == "tikhonov":
            return S @ V @ A + self.damping * V
        # A multiple of I is added to the product, not to the factor: p d numbers and not p^2 + d^2.
        shift = pair.shifts(self.damping)
        image = S @ V + shift.S * V
        return image @ A + shift.A * image

    def _by_layer(self, v: Tensor, act: Callable[[str, Tensor], Tensor]) -> Tensor:
        """``(..., n)``: `act` on the matrix ``(..., p, d)`` of each layer."""
        return self._layout.join({name: act(name, V) for name, V in self._layout.split(v).items()})

    def _matvec(self, v: Tensor) -> Tensor:
        return self._by_layer(v, self._act)

    def _matmat(self, block: Tensor) -> Tensor:
        return self._by_layer(block.T, self._act).T

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        # With a multiple of I: more of the same damping.
        values = other.values if isinstance(other, Diagonal) and other.values.ndim == 0 else None
        if values is None or self.damping_style != "tikhonov" or not readable(values, self.damping):
            return None
        damping = self.damping + values
        if not bool(damping >= 0):
            return None
        return self._like(self.factors, damping, self.structure.plus(other.structure))

    def _scale(self, factor: Scalar) -> LinearOperator:
        # pi scales so that l times the factor is the damping in either style.
        if isinstance(factor, Tensor) or not factor > 0:
            return super()._scale(factor)
        factors = {name: Factors(factor * S, A) for name, (S, A) in self.factors.items()}
        return self._like(factors, factor * self.damping, self.structure.times(factor))

    def _like(self, factors: dict[str, Factors], damping: Tensor, structure: Structure) -> KFAC:
        """One whose facts follow from those of this one, and stand or fall with its claims."""
        derived = KFAC(factors, self.domain, damping, damping_style=self.damping_style)
        derived._claims, derived.structure = self._claims, structure
        return derived

    def _cost(self) -> Cost:
        flops = 0
        for S, A in self.factors.values():
            entries = S.shape[:-1].numel() * A.shape[-1]
            flops += 2 * entries * (S.shape[-1] + A.shape[-1] + 1)
        return Cost(flops=flops)

    def _describe(self) -> str:
        layers = ", ".join(
            f"{name or 'module'}: {S.shape[-1]} x {A.shape[-1]}"
            for name, (S, A) in self.factors.items()
        )
        return f"{layers}; {self.damping_style} damping"

    def _exact_diagonal(self) -> Tensor:
        tikhonov = self.damping_style == "tikhonov"
        pairs = self.factors if tikhonov else self.damped_factors()
        diagonals = {
            name: S.diagonal(0, -2, -1)[..., :, None] * A.diagonal(0, -2, -1)[..., None, :]
            for name, (S, A) in pairs.items()
        }
        diagonal = self._layout.join(diagonals)
        return diagonal + self.damping if tikhonov else diagonal

    def _exact_logdet(self) -> Tensor:
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        if self.damping_style == "tikhonov":
            for S, A in self.factors.values():
                s, a = (in_single(torch.linalg.eigvalsh, factor).clamp_min(0) for factor in (S, A))
                total = total + (s[..., :, None] * a[..., None, :] + self.damping).log().sum()
            return total
        for S, A in self.damped_factors().values():
            of_S, of_A = (
                in_single(torch.linalg.slogdet, factor).logabsdet.sum() for factor in (S, A)
            )
            total = total + A.shape[-1] * of_S + S.shape[-1] * of_A
        return total
