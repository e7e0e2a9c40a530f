"""Kernels, linear functionals of what they model, and Gram operators that compute by tiles."""
