"""Curvature of models, and what stands in for it: Gauss-Newton, Fisher, K-FAC, quasi-Newton."""
