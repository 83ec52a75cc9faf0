"""Reads pickles that hold plain data, without letting them act.

A pickle is a program: it may name any function and call it. Two locks keep that out. Only operations that build plain
values pass, and the three names that NumPy writes for an array stand for objects of this module, so that not even
NumPy's own constructors run on what the file says.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers, text, bytes, tuples, lists and dictionaries; and what arrays need: a name, a call, a state.
OPERATIONS = frozenset(
    {
        *("PROTO", "FRAME", "MARK", "STOP", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    }
)
MAX_MEMO = 1_000_000  # the unpickler makes room up to the largest index at once


class PlainPickleError(ValueError):
    """The pickle is damaged, or holds more than plain data; the message says what."""


class _Array:
    """Stands for a NumPy array while its pickle is read."""

    def __init__(self) -> None:
        self.array: NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, data = state
        if not isinstance(dtype, _Bytes) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise PlainPickleError("it holds an array of something else than bytes")
        if not all(isinstance(length, int) and length >= 0 for length in shape) or math.prod(shape) != len(data):
            raise PlainPickleError(f"it holds an array of shape {shape} with {len(data)} bytes")
        flat = np.frombuffer(data, np.uint8)
        self.array = np.ascontiguousarray(flat.reshape(shape[::-1]).T) if columns_first else flat.reshape(shape)


class _Bytes:
    """Stands for the element type uint8."""

    def __setstate__(self, state: Any) -> None:
        """Take byte order, alignment and so on, which say nothing about bytes."""


class _Name:
    """What a name in the pickle stands for; a call gives what ``make`` returns, and its state cannot be set."""

    def __init__(self, make: Callable[..., object]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> object:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise PlainPickleError("it changes something that is not its own")


def _element_type(code: Any, *_: Any) -> _Bytes:
    if code not in ("u1", b"u1", "|u1", b"|u1"):
        raise PlainPickleError(f"it holds an array of element type {code!r}; only uint8 is read")
    return _Bytes()


def _refuse(*_: Any) -> object:
    raise PlainPickleError("it makes an array from a buffer")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return _Name(lambda *_: _Array())
            case "numpy", "ndarray":
                return _Name(_refuse)
            case "numpy", "dtype":
                return _Name(_element_type)
        raise PlainPickleError(f"it names {module}.{name}, which is not plain data")


def load_plain(data: bytes) -> dict[str, Any]:
    """Return the dictionary that a pickle holds: text keys, and plain values or uint8 arrays.

    Text that Python 2 wrote is returned as bytes, as nothing says whether it is text; keys are decoded.

    Raises:
        PlainPickleError: The pickle is damaged, holds anything else, or is no dictionary.
    """
    try:
        for operation, argument, _ in pickletools.genops(io.BytesIO(data)):
            if operation.name not in OPERATIONS:
                raise PlainPickleError(f"it has the operation {operation.name}, which plain data does not need")
            if operation.name in ("PUT", "LONG_BINPUT") and not 0 <= int(argument or 0) < MAX_MEMO:
                raise PlainPickleError(f"it has {argument} as a memo index")
        loaded = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(loaded, dict):
            raise PlainPickleError("it holds no dictionary")
        return {_text(key): value.array if isinstance(value, _Array) else value for key, value in loaded.items()}
    except PlainPickleError:
        raise
    # What a pickle can raise is not documented in full; these are what the unpickler and the checks above can.
    except (
        *(pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError, EOFError, ArithmeticError),
        *(MemoryError, RecursionError),
    ) as error:
        raise PlainPickleError(f"it is damaged: {error}") from error


def _text(key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode("ascii", "replace")
    if isinstance(key, str):
        return key
    raise PlainPickleError(f"it has the key {key!r}, which is no text")
