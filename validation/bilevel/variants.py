"""Random bilevel problems over sizes, conditioning, scales, dtypes, and inexact solutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from validation.bilevel.problems import Problem, quadratic
from validation.bilevel.run import EXACT, Meeting, Mode, met
from validation.drawn import drawn, st
from validation.report import Case


def variants(examples: int, seed: int, device: str = "cpu") -> list[Case]:
    """So many random quadratic or curved problems; exponents are to base 10."""
    exponent = st.integers(-6, 6)
    return drawn(
        lambda **settings: variant(device, **settings),
        examples,
        seed,
        n=st.integers(1, 20),
        p=st.integers(1, 8),
        condition=st.floats(0, 10),
        curved=st.booleans(),
        inner_scale=exponent,
        outer_scale=exponent,
        unit=exponent,
        single=st.booleans(),
        off=st.none() | st.floats(-12, 0),
        kind=st.sampled_from(["descent", "random"]),
        solver=st.sampled_from(sorted(EXACT)),
        rtol=st.none() | st.floats(-12, -2),
        draw=st.integers(0, 2**31),
    )


def variant(device: str, **settings: Any) -> Iterator[Case]:
    """A hypergradient of the problem with these settings."""
    problem = random_problem(**settings)
    meeting = Meeting(problem, device)
    off, rtol = settings["off"], settings["rtol"]
    y = meeting.y if off is None else meeting.stopped(10**off, settings["kind"])
    options = {} if rtol is None else {"rtol": 10**rtol}
    solver = EXACT[settings["solver"]](**options)
    mode = Mode(settings["solver"], meeting.by(y, solver=solver))
    yield met("variants", mode.name, problem, mode, **settings)


def random_problem(
    *,
    n: int,
    p: int,
    condition: float,
    curved: bool,
    inner_scale: int,
    outer_scale: int,
    unit: int,
    single: bool,
    draw: int,
    **rest: Any,
) -> Problem:
    """The problem of one draw."""
    rng = np.random.default_rng(draw)
    scales = (10.0**inner_scale, 10.0**outer_scale, 10.0**unit)
    values = np.logspace(0, -condition, n)
    # Anything between the least curvature and the largest.
    bend = float(10 ** -rng.uniform(0, condition)) if curved else 0.0
    made = quadratic(f"draw {draw}", rng, values, p, "random", bend, scales)
    rounded = made.single()
    # Rounding may have made the smallest curvature negative: that would be no minimum.
    definite = np.linalg.eigvalsh(rounded.data["H"].astype(float))[0] > 0
    return rounded if single and definite else made
