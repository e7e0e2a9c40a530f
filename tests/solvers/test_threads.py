"""BLAS has one thread inside, and as many as before outside."""

from __future__ import annotations

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from solvers.threads import one_blas_thread


def threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_limits_and_restores():
    with threadpool_limits(2, user_api="blas"):
        with one_blas_thread():
            assert threads() == {1}
        assert threads() == {2}
        with pytest.raises(ZeroDivisionError), one_blas_thread():
            1 / 0  # noqa: B018
        assert threads() == {2}
