"""Solvers that look at random combinations of the equations."""
