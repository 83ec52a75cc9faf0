"""Integer codes of 2 to 8 bits, packed without gaps.

Code i of n bits, in two's complement, takes the bits i·n to i·n + n − 1 of the result; bit j is bit j mod 8, counted
from the least significant, of byte j div 8. Bits behind the last code are zero.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MIN_BITS, MAX_BITS = 2, 8
# Eight codes of n bits fill n bytes, so a part of so many codes begins at a whole byte. Bounds the working memory.
_PART = 1 << 18


def bits_for(codes: NDArray[np.int8]) -> int:
    """Return the fewest bits, 2 to 8, in which all codes fit."""
    if not codes.size:
        return MIN_BITS
    low, high = int(codes.min()), int(codes.max())
    return max(MIN_BITS, 1 + max(high, ~low).bit_length())


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that so many codes take."""
    return (count * bits + 7) // 8


def pack(codes: NDArray[np.int8], bits: int) -> bytes:
    """Return the codes (one axis) packed; the caller has seen to it that they fit."""
    parts = []
    for start in range(0, codes.size, _PART):
        part = codes[start : start + _PART].view(np.uint8)
        kept = np.unpackbits(part[:, np.newaxis], axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(kept, bitorder="little").tobytes())
    return b"".join(parts)


def unpack(packed: memoryview, bits: int, count: int) -> Iterator[NDArray[np.int8]]:
    """Yield the codes that `pack` was given, in parts of bounded size.

    Args:
        packed: ``packed_size(count, bits)`` bytes.
        bits: Bits of a code.
        count: Number of codes.
    """
    sign = np.uint8(1 << (bits - 1))
    for start in range(0, count, _PART):
        length = min(_PART, count - start)
        begin = start * bits // 8
        part = np.frombuffer(packed[begin : begin + packed_size(length, bits)], np.uint8)
        flat = np.unpackbits(part, count=length * bits, bitorder="little")
        values = np.packbits(flat.reshape(length, bits), axis=1, bitorder="little")[:, 0]
        # Extends the sign in arithmetic modulo 256.
        yield ((values ^ sign) - sign).view(np.int8)
