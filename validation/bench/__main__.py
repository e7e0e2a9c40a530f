"""Benchmarks: ratios in one process, the rivals in turn, medians of several runs.

    python -m validation.bench [GROUP ...] [--threads N] [--repeats N]

Rivals must agree before they are timed. Machines are noisy: quote the ratio, not the seconds. The
ratios are also written to ``runs/validation/bench.h5``. Rivals that are not installed (curvlinops,
linear_operator) are left out.
"""

from __future__ import annotations

import argparse

import threadpoolctl
import torch

from validation.bench import (
    amg,
    approximations,
    auto,
    costs,
    curvature,
    dense_solvers,
    gp_pde,
    implicit,
    kfac,
    kronecker,
    krylov,
    nhgd,
    peers,
    runs,
    sparse,
    sparse_direct,
    sparse_jacobian,
    sum_of_sines,
    traces,
)
from validation.bench.timing import Bench

GROUPS = {
    "nhgd": (nhgd.fisher_inverse, nhgd.hessian_modes),
    "curvature": (curvature.hessian_product, curvature.gauss_newton_product, kfac.factors),
    "approximations": (approximations.mfac, approximations.nystrom, traces.errors, traces.logdet),
    "dense": (
        dense_solvers.overhead,
        dense_solvers.least_squares,
        dense_solvers.columns,
        dense_solvers.batches,
    ),
    "sparse": (sparse.product, sparse_jacobian.nonzeros),
    "kronecker": (kronecker.product,),
    "krylov": (krylov.dense, krylov.block, krylov.sparse),
    "sparse-direct": (sparse_direct.gradient, sparse_direct.blocks, sparse_direct.unsymmetric),
    "amg": (amg.against_pyamg, amg.many_right_hand_sides, amg.kernel),
    "peers": (peers.hypergradients,),
    "implicit": (implicit.overhead, implicit.sparse, implicit.unrolling),
    "gp-pde": (gp_pde.assembly, gp_pde.factorisation, gp_pde.smooth, gp_pde.steps),
    "runs": (runs.points, runs.checkpoint, runs.share),
    "auto": (auto.choice,),
    "costs": (costs.constants,),
    "sum-of-sines": (sum_of_sines.small, sum_of_sines.large),
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m validation.bench", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    unknown = set(options.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    torch.set_num_threads(options.threads)
    threadpoolctl.threadpool_limits(options.threads)
    bench = Bench(options.repeats)
    bench.console.print(
        f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats\n"
    )
    for pool in threadpoolctl.threadpool_info():
        bench.console.print(f"{pool['internal_api']}: {pool['num_threads']} threads")
    for group in options.groups or GROUPS:
        for comparison in GROUPS[group]:
            comparison(bench)


if __name__ == "__main__":
    main()
