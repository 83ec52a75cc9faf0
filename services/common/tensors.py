"""Tensors of the contract to and from NumPy arrays."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from granq.v1 import common_pb2
from services.common.errors import InvalidArgumentError

# The wire is little-endian on every machine.
_WIRE_TYPES: dict[common_pb2.DataType, np.dtype[Any]] = {
    common_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    common_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}
_MAX_AXES = 6


def to_tensor(array: NDArray[np.float32] | NDArray[np.int64]) -> common_pb2.Tensor:
    """Return an array as a message; raises as `fill_tensor` does."""
    tensor = common_pb2.Tensor()
    fill_tensor(tensor, array)
    return tensor


def fill_tensor(tensor: common_pb2.Tensor, array: NDArray[np.float32] | NDArray[np.int64]) -> None:
    """Write an array into an empty message, in row-major order.

    For images: a message that is set into another is copied there, and once more into the next.

    Raises:
        TypeError: The array is neither float32 nor int64; conversion is the caller's decision.
        ValueError: It has more than 6 axes.
    """
    if array.ndim > _MAX_AXES:
        raise ValueError(f"a tensor has at most {_MAX_AXES} axes, got {array.ndim}")
    for data_type, wire in _WIRE_TYPES.items():
        if array.dtype == wire.newbyteorder("="):
            tensor.data_type = data_type
            tensor.shape.extend(array.shape)
            tensor.data = np.ascontiguousarray(array, dtype=wire).tobytes()
            return
    raise TypeError(f"a tensor is float32 or int64, got {array.dtype}")


def from_tensor(tensor: common_pb2.Tensor, field: str = "") -> NDArray[np.float32] | NDArray[np.int64]:
    """Return a message as a writable array of its own memory, float32 or int64.

    Args:
        tensor: The message, not trusted.
        field: Its path in the request, which errors then name.

    Raises:
        InvalidArgumentError: Unknown element type, too many axes, a negative length, or data of the wrong size.
    """
    prefix = f"{field}." if field else ""
    wire = _WIRE_TYPES.get(tensor.data_type)
    if wire is None:
        raise InvalidArgumentError(f"unknown tensor data type {tensor.data_type}", field=f"{prefix}data_type")
    shape = tuple(tensor.shape)
    if len(shape) > _MAX_AXES or any(length < 0 for length in shape):
        raise InvalidArgumentError(f"a tensor cannot have the shape {shape}", field=f"{prefix}shape")
    expected = math.prod(shape) * wire.itemsize
    data = tensor.data  # each look at the field copies its bytes
    if len(data) != expected:
        raise InvalidArgumentError(
            f"a tensor of shape {shape} has {expected} bytes, got {len(data)}", field=f"{prefix}data"
        )
    # astype copies also where nothing is swapped: frombuffer alone is a read-only view of the message.
    array: NDArray[np.float32] | NDArray[np.int64] = np.frombuffer(data, wire).astype(wire.newbyteorder("="))
    return array.reshape(shape)
