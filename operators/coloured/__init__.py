"""Sparse Jacobians and Hessians of functions: pattern, colouring, recovery."""
