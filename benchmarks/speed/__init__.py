"""Tables of speed: fake quantization, a training iteration, and how its cost grows."""
