"""Solvers that use a structure of the operator."""
