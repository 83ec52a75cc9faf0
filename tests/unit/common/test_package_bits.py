"""Codes in as many bits as they need, and back."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.common.package import bits


@given(
    st.integers(2, 8).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(-(1 << n - 1), (1 << n - 1) - 1))))
)
def test_codes_of_every_width_come_back(case: tuple[int, list[int]]) -> None:
    width, values = case
    codes = np.array(values, np.int8)
    assert bits.bits_for(codes) <= width
    packed = bits.pack(codes, width)
    assert len(packed) == bits.packed_size(len(values), width)
    assert joined(bits.unpack(memoryview(packed), width, len(values))).tolist() == values


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("extra", [-1, 0, 5])
def test_parts_join_without_a_seam(width: int, extra: int) -> None:
    count = 2 * bits._PART + extra
    half = 1 << (width - 1)
    codes = np.random.default_rng(width).integers(-half, half, count).astype(np.int8)
    packed = bits.pack(codes, width)
    assert np.array_equal(joined(bits.unpack(memoryview(packed), width, count)), codes)
    # The layout itself, as the documentation states it.
    i = count - 1
    taken = int.from_bytes(packed[i * width // 8 : i * width // 8 + 2], "little") >> (i * width % 8)
    assert taken & (2 * half - 1) == int(codes[i]) & (2 * half - 1)


def joined(parts: Iterable[NDArray[np.int8]]) -> NDArray[np.int8]:
    return np.concatenate([np.empty(0, np.int8), *parts])


@pytest.mark.parametrize(
    ("low", "high", "width"), [(0, 0, 2), (-2, 1, 2), (-2, 2, 3), (-3, 0, 3), (-7, 7, 4), (-65, 0, 8), (-128, 127, 8)]
)
def test_the_fewest_bits_are_found(low: int, high: int, width: int) -> None:
    assert bits.bits_for(np.array([low, high], np.int8)) == width
