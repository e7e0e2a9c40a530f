"""The command line, a file for each command or family of them."""

from __future__ import annotations

from hyperlearn.cli import check, data, look, plot, run, show, sweep
from hyperlearn.cli.app import CHECK_FAILED, DIVERGED, INTERRUPTED, USER_ERROR, app

# Importing a file registers its commands; this is their order in the help.
_ORDER = [run, sweep, show, look, plot, check, data]
_FILES = [part.__name__ for part in _ORDER]
app.registered_commands.sort(key=lambda c: _FILES.index(str(getattr(c.callback, "__module__", ""))))

__all__ = ["CHECK_FAILED", "DIVERGED", "INTERRUPTED", "USER_ERROR", "app"]
