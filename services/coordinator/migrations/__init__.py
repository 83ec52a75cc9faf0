"""Revisions of the coordinator's tables; `services/coordinator/schema.py` runs them, at every start."""
