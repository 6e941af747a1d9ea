"""Comparison of this package with its alternatives: `python -m benchmarks`."""
