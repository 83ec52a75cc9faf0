"""Accuracy without data, measured: `python -m benchmarks.accuracy --help`."""
