"""Versions and surroundings of this process; nothing that names the machine or its user."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch


def environment(seed: int) -> dict[str, Any]:
    """Versions and surroundings of this process, to be stored with a run."""
    revision, dirty = _git_state()
    return {
        "seed": seed,
        "hyperlearn": _version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "git_revision": revision,
        "git_dirty": dirty,
    }


def _version() -> str:
    try:
        return version("hyperlearn")
    except PackageNotFoundError:  # on the path, but not installed
        return "unknown"


@functools.cache
def _git_state() -> tuple[str, bool | None]:
    """Revision of the checkout that the package runs from, as of first use; or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        # No lock, no terminal, no repository above an installed package's environment.
        env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, env=env
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # tracked here, not just nested
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return "unknown", None
