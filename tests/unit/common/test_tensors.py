"""Tensors cross the contract unchanged, and a wrong message is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from granq.v1 import common_pb2
from services.common.errors import InvalidArgumentError
from services.common.tensors import from_tensor, to_tensor

SHAPES = npst.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=4)


@given(st.one_of(npst.arrays(np.float32, SHAPES), npst.arrays(np.int64, SHAPES)))
def test_round_trip(array: np.ndarray) -> None:
    copy = from_tensor(to_tensor(array))
    assert copy.dtype == array.dtype
    assert copy.flags.writeable
    np.testing.assert_array_equal(copy, array)


def test_bytes_are_row_major_little_endian() -> None:
    columns = np.asfortranarray(np.array([[1, 2], [3, 4]], np.int64))
    assert to_tensor(columns).data == b"".join(value.to_bytes(8, "little") for value in (1, 2, 3, 4))
    assert to_tensor(np.array([1.5], ">f4").astype(np.float32)).data == b"\x00\x00\xc0\x3f"


@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.zeros(2, np.int32), np.zeros(2, object)])
def test_other_types_are_not_converted_silently(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match="float32 or int64"):
        to_tensor(array)


def test_too_many_axes() -> None:
    with pytest.raises(ValueError, match="at most 6"):
        to_tensor(np.zeros((1,) * 7, np.float32))


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        (common_pb2.Tensor(shape=[1], data=b"1234"), "images.data_type"),
        (common_pb2.Tensor(data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"1234"), "images.data"),
        (common_pb2.Tensor(data_type=common_pb2.DATA_TYPE_FLOAT32, shape=[-1, -1], data=b"1234"), "images.shape"),
        (common_pb2.Tensor(data_type=common_pb2.DATA_TYPE_INT64, shape=[1] * 7, data=b"12345678"), "images.shape"),
        (common_pb2.Tensor(data_type=common_pb2.DATA_TYPE_INT64, shape=[2**62] * 6, data=b""), "images.data"),
    ],
)
def test_wrong_messages_are_refused(tensor: common_pb2.Tensor, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        from_tensor(tensor, "images")
    assert caught.value.field == field
