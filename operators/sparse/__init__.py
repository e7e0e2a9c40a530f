"""Matrices held by their nonzeros: a static pattern and a dense tensor of values."""
