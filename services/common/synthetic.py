"""What all services agree on about synthetic sets."""


def held_out(count: int) -> int:
    """Return how many images at the end of a set of ``count`` are kept from calibration and training.

    A quarter, at most 256, at least one: they measure what was made from the others.
    """
    return max(1, min(256, count // 4))
