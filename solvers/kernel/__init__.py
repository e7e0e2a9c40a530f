"""Solvers for kernel matrices: entries at points, a low-rank factor, a sparse inverse factor."""
