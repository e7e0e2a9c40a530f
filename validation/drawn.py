"""Settings drawn by hypothesis, the same ones for the same seed; every outcome is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

try:
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from hypothesis.errors import HypothesisWarning
except ModuleNotFoundError as error:  # the tests need it, the library does not
    raise SystemExit(
        "validation draws its cases with hypothesis: pip install hypothesis"
    ) from error

from validation.report import Case

__all__ = ["drawn", "st"]


def drawn(
    meet: Callable[..., Iterable[Case]],
    examples: int,
    seed: int,
    **strategies: st.SearchStrategy[Any],
) -> list[Case]:
    """The cases of so many calls of `meet` with settings drawn from the strategies.

    Nothing is shrunk and nothing is kept from one run for the next: a case that fails is recorded
    with its parameters, and the others are run all the same.
    """
    found: list[Case] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.fixed_dictionaries(strategies))
    def once(parameters: dict[str, Any]) -> None:
        found.extend(meet(**parameters))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)
        once()
    return found
