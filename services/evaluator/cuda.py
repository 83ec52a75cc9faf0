"""The few calls of the CUDA driver that running an engine takes, through ctypes: no package is needed.

Not run on a GPU yet: the tests have a driver that answers by the book.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.errors import FailedPreconditionError, GranqError, InternalError, ResourceExhaustedError

LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2
_STREAM_NON_BLOCKING = 1
_Address, _Handle, _Size = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_Handle), ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxSetCurrent": (_Handle,),
    "cuMemGetInfo_v2": (ctypes.POINTER(_Size), ctypes.POINTER(_Size)),
    "cuMemAlloc_v2": (ctypes.POINTER(_Address), _Size),
    "cuMemFree_v2": (_Address,),
    "cuMemcpyHtoDAsync_v2": (_Address, _Handle, _Size, _Handle),
    "cuMemcpyDtoHAsync_v2": (_Handle, _Address, _Size, _Handle),
    "cuStreamCreate": (ctypes.POINTER(_Handle), ctypes.c_uint),
    "cuStreamSynchronize": (_Handle,),
    "cuStreamDestroy_v2": (_Handle,),
    "cuEventCreate": (ctypes.POINTER(_Handle), ctypes.c_uint),
    "cuEventRecord": (_Handle, _Handle),
    "cuEventSynchronize": (_Handle,),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _Handle, _Handle),
    "cuEventDestroy_v2": (_Handle,),
}


class Cuda:
    """The first GPU: its memory, one stream of work, and two events to time it with.

    The context is the device's primary one, which TensorRT uses, too.

    Args:
        open_library: Loads the driver's library by name.

    Attributes:
        stream: Handle of the stream, as TensorRT takes it.

    Raises:
        FailedPreconditionError: There is no driver or no GPU; says which.
    """

    def __init__(self, open_library: Callable[[str], Any] = ctypes.CDLL) -> None:
        try:
            self._library = open_library(LIBRARY)
        except OSError as error:
            raise _missing(f"the NVIDIA driver's library {LIBRARY} is not there") from error
        for name, arguments in _ARGUMENTS.items():
            getattr(self._library, name).argtypes = arguments
        try:
            self._call("cuInit", 0)
            device, context = ctypes.c_int(), _Handle()
            self._call("cuDeviceGet", ctypes.byref(device), 0)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        except InternalError as error:
            raise _missing(f"no NVIDIA GPU can be used: {error.message}") from error
        self._device = device
        self._call("cuCtxSetCurrent", context)
        stream = _Handle()
        self._call("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        self.stream = int(stream.value or 0)
        self._events = [self._event(), self._event()]

    def close(self) -> None:
        """Give everything back but memory, which its owners free before."""
        for event in self._events:
            self._call("cuEventDestroy_v2", event)
        self._call("cuStreamDestroy_v2", self.stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def used_bytes(self) -> int:
        """Return the memory of the GPU that is in use, by whomever."""
        free, total = _Size(), _Size()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def allocate(self, size: int) -> int:
        """Return the address of so many new bytes on the GPU.

        Raises:
            ResourceExhaustedError: It has no room.
        """
        address = _Address()
        self._call("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", address)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a C-contiguous array to the GPU, after the stream's earlier work and before its later."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Wait for the stream's work and return float32 numbers from the GPU."""
        array = np.empty(shape, np.float32)
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)
        self._call("cuStreamSynchronize", self.stream)
        return array

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        """Return the GPU's own time for what ``enqueue`` puts into the stream, and wait for it."""
        start, end = self._events
        self._call("cuEventRecord", start, self.stream)
        enqueue()
        self._call("cuEventRecord", end, self.stream)
        self._call("cuEventSynchronize", end)
        elapsed = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value

    def _event(self) -> int:
        event = _Handle()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        return int(event.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise self._error(name, status)

    def _error(self, name: str, status: int) -> GranqError:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        message = f"{name}: {(text.value or b'unknown error').decode(errors='replace')} ({status})"
        if status == _OUT_OF_MEMORY:
            return ResourceExhaustedError(f"the GPU has no memory left; {message}", reason="OUT_OF_MEMORY")
        return InternalError(message)


def _missing(what: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"engines run on an NVIDIA GPU only: {what}", reason="GPU_REQUIRED", field="engine")
