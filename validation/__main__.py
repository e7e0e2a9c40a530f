"""Checks that a user can run on their own machine; each writes a report.

    python -m validation [STUDY ...] [--examples N] [--seed S] [--only GROUP] [--device D]
                         [--dtype T] [--out FILE]

Studies (by default suite, zoo, bilevel):

- suite: properties of operators, solvers, engine and algorithms on random cases;
- zoo: systems that solvers get wrong, and whether they say so;
- bilevel: bilevel problems with references in 80-bit numbers, and whether a wrong hypergradient is
  ever let through;
- crash: runs that are killed, cut, flipped, or that meet a full disk: nothing may be lost;
- gp-pde: anchors of the GP-PDE solver (``python -m validation.gp_pde --list``);
- hypergradients: every solver against central differences on three regressions;
- cleaning, relaxation: published tables; over an hour of training.

Exits with 1 where anything failed. ``python -m validation.STUDY --help`` tells of each alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from validation import cleaning, crash, gp_pde, hypergradients, relaxation, suite, zoo
from validation.bilevel import __main__ as bilevel


def main(arguments: list[str] | None = None) -> bool:
    """Entry point; whether every study is sound."""
    parser = argparse.ArgumentParser(
        prog="python -m validation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY")
    parser.add_argument("--examples", type=int, help="random cases: a group of the suite (default "
                        "30), of the bilevel zoo (300)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of suite and bilevel (default 0)")
    parser.add_argument("--device", default="cpu", help="of suite and bilevel (default cpu)")
    parser.add_argument("--dtype", default="float64", choices=list(suite.DTYPES), help="of suite")
    parser.add_argument("--only", default="", metavar="GROUP",
                        help="of the suite's groups, or bilevel problems of this name")  # fmt: skip
    parser.add_argument("--out", type=Path, help="report of the suite; that of bilevel stands "
                        "beside it (default runs/validation/)")  # fmt: skip
    options = parser.parse_args(arguments)
    shared = ["--seed", str(options.seed), "--device", options.device, "--only", options.only]
    if options.examples is not None:
        shared += ["--examples", str(options.examples)]

    def out(name: str) -> list[str]:
        if options.out is None:
            return []
        path = (
            options.out if name == "suite" else options.out.with_stem(f"{options.out.stem}-{name}")
        )
        return ["--out", str(path)]

    studies: dict[str, Callable[[], bool | None]] = {
        "suite": lambda: suite.main([*shared, "--dtype", options.dtype, *out("suite")]),
        "zoo": lambda: zoo.main([]),
        "bilevel": lambda: bilevel.main([*shared, *out("bilevel")]),
        "crash": lambda: crash.main(["--seed", str(options.seed)]),
        "gp-pde": lambda: gp_pde.main(["--seed", str(options.seed)]),
        "hypergradients": hypergradients.main,
        "cleaning": lambda: cleaning.main(["table"]),
        "relaxation": lambda: relaxation.main([]),
    }
    unknown = set(options.studies) - set(studies)
    if unknown:
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(studies)}")
    # A study that returns nothing has nothing to fail: it prints a table.
    verdicts = [studies[name]() for name in options.studies or ("suite", "zoo", "bilevel")]
    return all(verdict is not False for verdict in verdicts)


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
