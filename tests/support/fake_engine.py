"""Stand for a GPU and for the runtime that loads engines on it: what runs is a graph, in ONNX Runtime.

They keep the rules that the real ones have: an address must be set and valid, a batch must lie within the profile, the
work happens in the stream that the copies use.
"""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from granq.v1 import artifacts_pb2, common_pb2, reports_pb2
from tests.support.fake_tensorrt import ILogger, Severity

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class FakeGpu:
    """Memory by address, and a clock that always tells two milliseconds.

    Attributes:
        memory: What is allocated.
        batches: Sizes of the batches that ran.
    """

    stream = 7

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self.batches: list[int] = []
        self.closed = False
        self._next = 1 << 40  # beyond 32 bits, as real ones are

    def used_bytes(self) -> int:
        return 1000 + sum(map(len, self.memory.values()))

    def allocate(self, size: int) -> int:
        self._next += 1 << 20
        self.memory[self._next] = bytearray(size)
        return self._next

    def free(self, address: int) -> None:
        del self.memory[address]

    def upload(self, address: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= len(self.memory[address])
        self.memory[address][: array.nbytes] = array.tobytes()

    def download(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = int(np.prod(shape))
        return np.frombuffer(bytes(self.memory[address]), np.float32, count).reshape(shape).copy()

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        enqueue()
        return 2.0

    def close(self) -> None:
        assert not self.memory
        self.closed = True


class FakeRuntime(ModuleType):
    """A module to put into sys.modules as tensorrt or tensorrt_rtx.

    Args:
        gpu: Where it runs.
        run: What an engine computes.
        limits: Smallest and largest batch.
        fail: "start", "load", "prepare" or "run"; "" for none.
        shapes: Input and output.
    """

    def __init__(
        self,
        gpu: FakeGpu,
        run: Run,
        limits: tuple[int, int] = (2, 8),
        fail: str = "",
        shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((-1, 3, 8, 8), (-1, 5)),
    ) -> None:
        super().__init__("tensorrt")
        self.__version__ = "10.13.3.9"
        self.ILogger = ILogger
        self.Logger = _Logger
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.DataType = SimpleNamespace(FLOAT="float")
        self._gpu, self._run, self._limits, self._fail = gpu, run, limits, fail
        self._shapes = dict(zip(("images", "logits"), shapes, strict=True))

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        self._log = log
        if self._fail == "start":
            log.log(Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def _load(self, plan: bytes) -> Any:
        if self._fail == "load" or plan != b"plan":
            self._log.log(Severity.ERROR, "Serialization assertion magicTag == kMAGIC_TAG failed.")
            return None
        names = list(self._shapes)
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda i: names[i],
            get_tensor_mode=lambda name: "in" if name == "images" else "out",
            get_tensor_shape=lambda name: self._shapes[name],
            get_tensor_dtype=lambda name: "float",
            create_execution_context=lambda: None if self._fail == "prepare" else _Context(self),
        )


class _Logger(ILogger):
    def __init__(self, severity: int = Severity.WARNING) -> None:
        super().__init__()

    def log(self, severity: int, message: str) -> None:
        raise AssertionError(message)


class _Context:
    def __init__(self, module: FakeRuntime) -> None:
        self._module = module
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address in self._module._gpu.memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self._module._limits
        if not low <= shape[0] <= high:
            self._module._log.log(Severity.ERROR, f"Static dimension mismatch: batch {shape[0]} is out of the profile")
            return False
        self._shape = shape
        return name == "images"

    def execute_async_v3(self, stream: int) -> bool:
        gpu = self._module._gpu
        if self._module._fail == "run" or stream != gpu.stream or set(self._addresses) != {"images", "logits"}:
            return False
        gpu.batches.append(self._shape[0])
        logits = self._module._run(gpu.download(self._addresses["images"], self._shape))
        gpu.upload(self._addresses["logits"], np.ascontiguousarray(logits))
        return True


def engine_manifest(engine: artifacts_pb2.Artifact, onnx_digest: str = "") -> reports_pb2.EngineManifest:
    """Return the manifest of FakeRuntime's engine on an L4."""
    return reports_pb2.EngineManifest(
        engine=engine,
        onnx_digest=onnx_digest,
        runtime=common_pb2.RUNTIME_TENSORRT,
        runtime_version="10.13.3.9",
        compute_capabilities=["8.9"],
        batch=common_pb2.BatchProfile(min=2, opt=4, max=8),
        tensors=[
            reports_pb2.EngineTensor(name="images", input=True, data_type="FLOAT", shape=[-1, 3, 8, 8]),
            reports_pb2.EngineTensor(name="logits", data_type="FLOAT", shape=[-1, 5]),
        ],
        platform="linux-x86_64",
        driver_version="580.95.05",
    )
