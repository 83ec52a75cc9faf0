"""The generator's fused kernels."""
