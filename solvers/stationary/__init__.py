"""Iterations with a fixed rule: Neumann, Richardson, SOR, Broyden, stochastic gradients."""
