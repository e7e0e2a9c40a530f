"""Benchmarks: ratios in one process, the rivals in turn, medians of several runs."""
