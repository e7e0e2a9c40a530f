"""``python -m hyperlearn.cli``."""

from hyperlearn.cli import app

app()
