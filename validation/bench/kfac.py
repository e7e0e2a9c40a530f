"""The Kronecker factors of K-FAC from a batch: ours and curvlinops'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import operators as ops
from validation.bench import limits
from validation.bench.timing import Bench

CLASSES = 10
# Passes back from the outputs: the root of the softmax Hessian has rank C - 1.
BACKWARD = {"type-2": CLASSES - 1, "mc": 1, "empirical": 1, "forward-only": 0}


def mlp() -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """An MLP 784-512-512-10, a batch of 512, and the positions a sample has in each layer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )
    return net, torch.randn(512, 784), (1, 1, 1)


def cnn() -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """Two convolutions of 28 x 28 images, a batch of 128."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, CLASSES)),
    )
    return net, torch.randn(128, 1, 28, 28), (28 * 28, 14 * 14, 1)


def least_flops(factors: Sequence[tuple[Tensor, Tensor]], terms: Sequence[int], back: int) -> int:
    """Forward, ``A = sum a a^T``, and `back` times: through all layers but one, ``sum g g^T``."""
    total = 0
    for index, ((S, A), count) in enumerate(zip(factors, terms, strict=True)):
        p, d = len(S), len(A)
        weights = 2 * count * p * (d - 1)
        moments = 2 * count * p * p
        total += weights + 2 * count * d * d + back * (moments + (weights if index else 0))
    return total


def factors(bench: Bench) -> None:
    """All factors of one batch, for each kind of Fisher matrix."""
    theirs = bench.optional("curvlinops")
    for name, network in (
        ("MLP 784-512-512-10, batch 512", mlp()),
        ("CNN on 28 x 28, batch 128", cnn()),
    ):
        for fisher in BACKWARD:
            factors_of(bench, name, *network, fisher, theirs)


def factors_of(
    bench: Bench,
    name: str,
    net: nn.Module,
    inputs: Tensor,
    positions: Sequence[int],
    fisher: Any,
    curvlinops: Any,
) -> None:
    """The factors of one network and one kind of Fisher matrix."""
    targets = torch.randint(0, CLASSES, (len(inputs),))

    def ours() -> ops.KFAC:
        return ops.KFAC.from_module(net, "categorical", inputs, targets, fisher=fisher)

    def theirs() -> Any:
        operator = curvlinops.KFACLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            list(net.parameters()),
            [(inputs, targets)],
            fisher_type=fisher,
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=len(inputs),
            num_per_example_loss_terms=1,
        )
        operator.compute_kronecker_factors()
        return operator

    rivals: dict[str, Callable[[], object]] = {"KFAC": ours}
    if curvlinops:
        rivals["curvlinops"] = theirs
        check(ours(), theirs(), drawn=fisher == "mc")
    terms = [len(inputs) * count for count in positions]
    flops = least_flops(list(ours().factors.values()), terms, BACKWARD[fisher])
    limit = "one matrix product of as many flops"
    bench.compare(
        f"K-FAC factors, {name}, fisher={fisher!r}, float32",
        rivals,
        lambda medians: (
            f"{flops / 1e9:.2f} Gflop in matrix products; ours takes "
            f"{medians['KFAC'] / medians[limit]:.1f} times as long as one matrix product of so "
            f"many ({flops / 1e9 / medians['KFAC']:.0f} Gflop/s)."
        ),
        tolerance=None,  # operators, not numbers: see `check`
        beside={limit: limits.matrix_product(flops)},
    )


def check(ours: ops.KFAC, theirs: Any, *, drawn: bool) -> None:
    """The same products; of factors of labels drawn by either, the same trace up to their noise."""
    if drawn:
        torch.testing.assert_close(ops.trace(ours).value, theirs.trace, rtol=0.2, atol=0)
        return
    v = torch.randn(ours.shape[1], 4)
    expected = theirs @ v
    torch.testing.assert_close(ours @ v, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
