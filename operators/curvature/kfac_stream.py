"""`KFACStream`: Kronecker factors averaged over batches, of a trajectory or of a data set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from operators.curvature.kfac import KFAC, DampingStyle
from operators.curvature.kronecker_factors import FactorEstimator, Factors, FisherKind
from operators.curvature.likelihood import Likelihood
from operators.curvature.weight_sharing import WeightSharing
from operators.space import Space, Tree


class KFACStream:
    """K-FAC of a stream of batches: averages of the factors, at the parameters of each moment.

    With ``rho = None`` the factors are exact means over all samples so far (over a data set whose
    batches need not be of one size), and with smoothing ``0 < rho <= 1`` at update k

        A <- (1 - rho_k) A + rho_k A_batch ,    S <- (1 - rho_k) S + rho_k S_batch ,

    with ``rho_1 = 1``: the first batch starts the average, and no initial value has to be
    forgotten. `damping` stands outside the average and never decays.

    Parameters
    ----------
    module
        A network; `update` takes its parameters as they are then.
    likelihood, fisher, weight_sharing, parameters, mc_samples, generator
        As for `KFAC.from_module`. Labels are drawn from one generator, batch after batch.
    damping, damping_style
        As for `KFAC`. The attribute `damping` may be set anew at any time.
    rho
        Smoothing factor in (0, 1], or None for the exact mean.
    warmup
        Whether ``rho_k = max(1 / k, rho)`` (Martens and Grosse, 2015, arXiv:1503.05671, section 5:
        the mean of the first ``1 / rho`` batches, smoothing from then on); else ``rho_k = rho``
        after the first batch, which then weighs ``(1 - rho)^(k - 1)`` for long.

    Raises
    ------
    ValueError, TypeError
        A setting out of range, or a module as `FactorEstimator` refuses it.

    Notes
    -----
    The mean of a product is not the product of means: averaging S and A is part of the
    approximation, and of K-FAC as published. An update costs what `KFAC.from_module` does; the
    state is one pair of factors for each layer.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> stream = KFACStream(net, "gaussian", damping=0.0, rho=0.25)
    >>> stream.update(torch.tensor([[2.0]]))
    >>> stream.update(torch.tensor([[4.0]]))
    >>> stream.operator().factors[""].A  # 0.75 * 4 + 0.25 * 16
    tensor([[7.]])
    """

    def __init__(
        self,
        module: nn.Module,
        likelihood: str | nn.Module | Likelihood,
        *,
        damping: float,
        damping_style: DampingStyle = "factored",
        rho: float | None = None,
        warmup: bool = False,
        fisher: FisherKind = "type-2",
        weight_sharing: WeightSharing = "expand",
        parameters: Iterable[str] | None = None,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not damping >= 0:
            raise ValueError(f"damping={damping}; expected >= 0")
        if damping_style not in ("factored", "tikhonov"):
            raise ValueError(f"damping_style={damping_style!r}; expected 'factored' or 'tikhonov'")
        if rho is not None and not 0 < rho <= 1:
            raise ValueError(f"rho={rho}; expected 0 < rho <= 1, or None for the exact mean")
        if warmup and rho is None:
            raise ValueError("warmup=True with rho=None; the exact mean needs none")
        self._estimator = FactorEstimator(
            module,
            likelihood,
            fisher=fisher,
            weight_sharing=weight_sharing,
            parameters=parameters,
            mc_samples=mc_samples,
            generator=generator,
        )
        self.damping, self.damping_style = damping, damping_style
        self.rho, self.warmup = rho, warmup
        self.reset()

    @property
    def space(self) -> Space:
        """Space of the parameters."""
        return self._estimator.space

    def reset(self) -> None:
        """Forget every batch."""
        self._factors: dict[str, Factors] = {}
        self._updates = 0
        self._samples = 0

    def __len__(self) -> int:
        return self._updates

    def update(self, inputs: Tree, targets: Tensor | None = None) -> None:
        """Take a batch into the average.

        Raises
        ------
        ValueError, TypeError
            As a call of `FactorEstimator`; the average is then as it was.
        """
        batch, count = self._estimator(inputs, targets)
        self._updates += 1
        self._samples += count
        if not self._factors:
            self._factors = batch
            return
        share = self._share(count)
        # New tensors: those of operators made before stay as they are.
        self._factors = {
            name: Factors(
                *(old.lerp(new, share) for old, new in zip(pair, batch[name], strict=True))
            )
            for name, pair in self._factors.items()
        }

    def _share(self, count: int) -> float:
        """``rho_k``."""
        if self.rho is None:
            return count / self._samples
        return max(self.rho, 1 / self._updates) if self.warmup else self.rho

    def operator(self) -> KFAC:
        """The operator as of now.

        Raises
        ------
        RuntimeError
            There was no update yet.
        """
        if not self._factors:
            raise RuntimeError("no batch was taken in; call update first")
        return KFAC._of_estimates(
            self._factors, self.space, self.damping, damping_style=self.damping_style
        )
