"""Fused kernels that several services compute with."""
