"""The zoo of bilevel problems: is a wrong hypergradient ever let through?

    python -m validation.bilevel [--examples N] [--seed S] [--only FAMILY] [--out FILE] [--peers]

Some hundred problems, each with its hypergradient in 80-bit arithmetic, meet every way that
hyperlearn has: `hypergradient` with exact solvers, at inexact y, with surrogates; autograd through
solutions, implicit, unrolled, truncated; forward mode, vmap, finite differences. Then random
problems, `--examples` of them, by hypothesis. Counted are

- claims violated: a true error above 10 times what the certificate claims (must be 0);
- wrong and not flagged: a relative error above 1e-2 with no exception, no warning, no
  ``converged=False``, and the certificate trustworthy to 1e-3 (must be 0);
- disagreements: an exact way beyond its tolerance, without a flag (must be 0);
- no answer: an exception other than those that say what is wrong with a problem: singular, not
  definite, not converged, not finite (must be 0);
- false alarms: flagged though the error is below 1e-5.

What approximates by request and has no certificate (``"truncated(5)"``, ``"one_step"``) is counted
apart, as biased. ``--peers`` runs the same problems through JAXopt with its defaults, where it is
installed (``pip install -e '.[peers]'``). About 10 minutes on one core of a 2-core machine, the
peer as long again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from validation.bilevel import peers
from validation.bilevel.problems import zoo
from validation.bilevel.run import Meeting, met
from validation.bilevel.variants import variants
from validation.report import Case, by, failures, picture, show, write

REPORT = Path("runs/validation/bilevel.h5")


def run(seed: int, only: str = "", device: str = "cpu") -> list[Case]:
    """Every mode meets every problem whose name holds `only`."""
    cases = []
    for problem in zoo(seed):
        if only in problem.name:
            meeting = Meeting(problem, device)
            cases += [met(problem.family, m.name, problem, m) for m in meeting.modes()]
    return cases


def main(arguments: list[str] | None = None) -> bool:
    """Entry point; whether nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.bilevel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=300, help="random problems (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="FAMILY", help="problems of this name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="the systems are small (default 1)")
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--peers", action="store_true", help="JAXopt as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=200)
    cases = run(options.seed, options.only, options.device)
    console.print(f"{sum(options.only in p.name for p in zoo(options.seed))} problems")
    if cases:
        show("By family", by(cases, "group"), console)
        show("By way", by(cases, "name"), console)
    if options.examples and not options.only:
        random = variants(options.examples, options.seed, options.device)
        show(f"{options.examples} random problems, by solver", by(random, "name"), console)
        cases += random
    write(cases, options.out, seed=options.seed, device=options.device, examples=options.examples)
    picture(cases, options.out)
    sound = failures(cases, console)
    console.print(f"written to {options.out}, and a picture beside it")
    if options.peers:
        peers.main(options.seed, options.only, console, options.out.with_stem("bilevel-jaxopt"))
    return sound


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
