"""The automatic choice of a solver, and its reasons."""
