"""Derivatives against values: what `hyperlearn.check` is made of."""

from hyperlearn.checks.report import CheckFailedError, CheckReport, CheckRow

__all__ = ["CheckFailedError", "CheckReport", "CheckRow"]
