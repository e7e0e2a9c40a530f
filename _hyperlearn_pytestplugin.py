"""Fixture `check_hypergradient` for pytest.

It stands outside of the package, because pytest imports it at the start of every run, and an import
of anything inside would import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hyperlearn import CheckReport


@pytest.fixture(scope="session")
def check_hypergradient() -> Callable[..., CheckReport]:
    """`hyperlearn.check`, raising an AssertionError with the table if it does not pass.

    Returns the report if it does.

    Examples
    --------
    ::

        def test_gradient(check_hypergradient):
            check_hypergradient(my_problem, rtol=1e-4)
    """

    def check_hypergradient(*args: Any, **kwargs: Any) -> CheckReport:
        __tracebackhide__ = True
        import hyperlearn

        report = hyperlearn.check(*args, **kwargs)
        report.raise_for_failure()
        return report

    return check_hypergradient
