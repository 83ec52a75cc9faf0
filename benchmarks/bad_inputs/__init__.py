"""Sends bad and hostile inputs to the real servers: `python -m benchmarks.bad_inputs`."""
