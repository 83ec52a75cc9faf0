"""Runs the four services on this machine, for `granq up`."""
