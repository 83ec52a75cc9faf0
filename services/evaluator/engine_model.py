"""Engines run through the runtime's own bindings, TensorRT's and TensorRT-RTX's by the same calls.

Not run on a GPU yet: the names and signatures are checked against both bindings, the flow against stand-ins.
"""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from granq.engines.fit import misfits
from granq.engines.machine import RUNTIME_PACKAGES, this_machine
from granq.v1 import reports_pb2
from services.common.errors import FailedPreconditionError, InternalError, InvalidArgumentError

FIELD = "engine"
_FLOAT_BYTES = 4


class Gpu(Protocol):
    """What running an engine takes of a GPU; cuda.Cuda is one."""

    stream: int

    def used_bytes(self) -> int:
        """As Cuda."""

    def allocate(self, size: int) -> int:
        """As Cuda."""

    def free(self, address: int) -> None:
        """As Cuda."""

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """As Cuda."""

    def download(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """As Cuda."""

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        """As Cuda."""


def require_fit(manifest: reports_pb2.EngineManifest) -> None:
    """Refuse an engine that does not run on this machine; nothing of it is loaded, nor is its runtime.

    Raises:
        FailedPreconditionError: It does not; every reason is named.
    """
    reasons = misfits(manifest, this_machine())
    if reasons:
        raise FailedPreconditionError(
            f"the engine does not run on this evaluator: {'; '.join(reasons)}", reason="ENGINE_FOREIGN", field=FIELD
        )


class EngineModel:
    """An engine ready to run, with buffers for its largest batch.

    Whoever makes one has called require_fit, and closes it.

    Args:
        plan: The engine.
        manifest: What it is.
        gpu: Where it runs.

    Attributes:
        gpu: As given.
        input_shape: Channels, height and width of an image.
        num_classes: Number of logits.
        batch: Smallest, tuned-for and largest batch.
        runtime: Name and version of the runtime, such as "tensorrt 10.13.3".
        device_memory_bytes: Memory that it took on the GPU.

    Raises:
        FailedPreconditionError: The runtime cannot be loaded or refuses the engine; its messages are included.
        InvalidArgumentError: The engine is no classifier, or not what the manifest says.
        ResourceExhaustedError: The GPU has no room for it.
    """

    def __init__(self, plan: bytes, manifest: reports_pb2.EngineManifest, gpu: Gpu) -> None:
        module = RUNTIME_PACKAGES[manifest.runtime][0]
        try:
            trt = importlib.import_module(module)
        except (ImportError, OSError) as error:
            raise FailedPreconditionError(f"{module} is installed but cannot be loaded: {error}") from error
        self.runtime = f"{module} {trt.__version__}"
        self.batch = (manifest.batch.min, manifest.batch.opt, manifest.batch.max)
        self.kernels = None
        self.gpu = gpu
        self._log = _log_of(trt)
        before = gpu.used_bytes()
        try:
            self._runtime = trt.Runtime(self._log)
        except TypeError as error:  # the bindings' way to say that the library gave nothing
            raise self._refusal("cannot start") from error
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refusal("refuses the engine")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._refusal("cannot prepare the engine")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if n not in inputs]
        described = {t.name: (t.input, list(t.shape)) for t in manifest.tensors}
        shapes = {name: list(self._engine.get_tensor_shape(name)) for name in names}
        floats = all(self._engine.get_tensor_dtype(name) == trt.DataType.FLOAT for name in names)
        if described != {name: (name in inputs, shapes[name]) for name in names} or not floats:
            raise InvalidArgumentError(
                f"the engine has other inputs and outputs than its manifest: {shapes}", field=FIELD
            )
        if (len(inputs), len(outputs)) != (1, 1) or (len(shapes[inputs[0]]), len(shapes[outputs[0]])) != (4, 2):
            raise InvalidArgumentError("the engine is no classifier: N×C×H×W in, N×K out", field=FIELD)
        (self._input,), (self._output,) = inputs, outputs
        channels, height, width = shapes[self._input][1:]
        self.input_shape, self.num_classes = (channels, height, width), shapes[self._output][1]
        self._addresses = [
            gpu.allocate(_FLOAT_BYTES * self.batch[2] * size) for size in (channels * height * width, self.num_classes)
        ]
        for name, address in zip((self._input, self._output), self._addresses, strict=True):
            self._must(self._context.set_tensor_address(name, address), f"take an address for {name}")
        self.run(np.zeros((self.batch[2], *self.input_shape), np.float32))
        self.device_memory_bytes = gpu.used_bytes() - before

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 N×K logits of float32 N×C×H×W images.

        More images than the largest batch run in several batches; fewer than the smallest are filled up with copies.

        Raises:
            InvalidArgumentError: The engine gives logits that are not finite numbers.
        """
        parts = []
        for start in range(0, len(images), self.batch[2]):
            part = images[start : start + self.batch[2]]
            self.load(part)
            self.enqueue()
            logits = self.gpu.download(self._addresses[1], (max(len(part), self.batch[0]), self.num_classes))
            parts.append(logits[: len(part)])
        result = np.concatenate(parts)
        if not np.isfinite(result).all():
            raise InvalidArgumentError("the engine gives logits that are infinite or NaN", field=FIELD)
        return result

    def load(self, images: NDArray[np.float32]) -> None:
        """Put one batch, no larger than the largest, onto the GPU."""
        missing = self.batch[0] - len(images)
        if missing > 0:
            images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        self._must(self._context.set_input_shape(self._input, tuple(images.shape)), f"take a batch of {len(images)}")
        # Kept until the next batch, since the copy may go on after the call.
        self._loaded = np.ascontiguousarray(images, np.float32)
        self.gpu.upload(self._addresses[0], self._loaded)

    def enqueue(self) -> None:
        """Put the run of what was loaded into the GPU's stream."""
        self._must(self._context.execute_async_v3(self.gpu.stream), "run")

    def close(self) -> None:
        """Free the engine and its buffers."""
        del self._context, self._engine, self._runtime
        for address in self._addresses:
            self.gpu.free(address)

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise InternalError(f"the engine could not {what}: {self._words()}")

    def _refusal(self, what: str) -> FailedPreconditionError:
        return FailedPreconditionError(f"{self.runtime} {what}: {self._words()}", reason="ENGINE_REFUSED", field=FIELD)

    def _words(self) -> str:
        return "; ".join(dict.fromkeys(m.strip() for m in self._log.messages)) or "it gave no reason"


def _log_of(trt: Any) -> Any:
    """Return a logger that keeps errors and warnings instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.messages.append(message)

    return Log()
