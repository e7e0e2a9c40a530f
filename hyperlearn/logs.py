"""What the library logs, shown on standard error; below a progress bar, and not through it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def shown(level: int = logging.INFO) -> Iterator[None]:
    """Show what the logger ``hyperlearn`` gets, while inside.

    Parameters
    ----------
    level
        The least level to show: ``logging.INFO`` for start, resumption and end of runs,
        ``logging.DEBUG`` for records and checkpoints as well.

    Examples
    --------
    >>> import hyperlearn as hl
    >>> with shown(logging.DEBUG):
    ...     pass  # hl.minimize(...)
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger = logging.getLogger("hyperlearn")
    before = logger.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
