"""Feeds damaged and hostile inputs to every parser of this project: `python -m benchmarks.fuzz`."""
