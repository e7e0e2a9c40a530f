"""Randomised linear algebra: Nystrom approximations, traces, log-determinants."""
