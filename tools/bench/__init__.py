"""Benchmarks: two ways in one run, alternating; the ratio is the result."""
