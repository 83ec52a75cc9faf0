"""The quantizer: quantization-aware training without data, and export."""
