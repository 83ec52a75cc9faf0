"""Stands for NVIDIA's `tensorrt` on machines without a GPU: what builds use of the API that 10.3 to 11.4 share.

What was called is recorded in `calls`; `fail` makes one step fail in the way that the bindings do.
"""

import json
from types import ModuleType, SimpleNamespace
from typing import Any


class Severity:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger(Severity):
    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class FakeTensorRT(ModuleType):
    """A module to put into sys.modules.

    Args:
        version: Its __version__.
        fail: "builder", "parse", "profile", "cache", "build" or "load"; "" for none.
        kernels: What the inspector lists of an engine.
    """

    def __init__(self, version: str, fail: str = "", kernels: list[dict[str, Any]] | None = None) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.calls: dict[str, Any] = {}
        self.ILogger = ILogger
        self.IProgressMonitor = IProgressMonitor
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1 if version.startswith("10.") else 0)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.fail = fail
        self.kernels = kernels or []
        self.log: Any = None

    def Builder(self, log: Any) -> Any:  # noqa: N802
        self.log = log
        if self.fail == "builder":
            log.log(Severity.ERROR, "createInferBuilder: CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(
            create_network=self._network,
            create_builder_config=lambda: _Config(self),
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda *shapes: self.calls.update(profile=shapes)
            ),
            build_serialized_network=self._build,
        )

    def OnnxParser(self, network: Any, log: Any) -> Any:  # noqa: N802
        errors = ["In node 3 (importConv): UNSUPPORTED_NODE"] if self.fail == "parse" else []
        return SimpleNamespace(
            parse=lambda data: self.calls.update(onnx=data) or not errors,
            num_errors=len(errors),
            get_error=lambda i: SimpleNamespace(desc=lambda: errors[i]),
        )

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: None if self.fail == "load" else _Engine(self))

    def _network(self, flags: int) -> Any:
        self.calls["flags"] = flags
        source = SimpleNamespace(name="images", shape=(-1, 3, 8, 8), dtype="DataType.FLOAT")
        target = SimpleNamespace(name="logits", shape=(-1, 5), dtype="DataType.FLOAT")
        return SimpleNamespace(num_inputs=1, num_outputs=1, get_input=lambda i: source, get_output=lambda i: target)

    def _build(self, network: Any, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactic selection", "Building Engine", 9)
        assert monitor.step_complete("Tactic selection", 0)
        assert monitor.step_complete("Building Engine", 0)
        monitor.phase_finish("Tactic selection")
        monitor.phase_finish("Building Engine")
        self.log.log(Severity.INFO, "Local timing cache in use.")
        self.log.log(Severity.WARNING, "CUDA lazy loading is not enabled.")
        if self.fail == "build":
            self.log.log(Severity.ERROR, "IBuilder::buildSerializedNetwork: Error Code 10: no implementation for conv1")
            return None
        return b"plan"


class _Engine:
    """An engine with one input and one output, whose inspector shows formats only for shapes that are fixed."""

    num_io_tensors = 2

    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        self.shapes: dict[str, tuple[int, ...]] = {}

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3, 8, 8) if name == "images" else (-1, 5)

    def create_execution_context(self) -> Any:
        return SimpleNamespace(set_input_shape=lambda name, shape: self.shapes.update({name: shape}) or True)

    def create_engine_inspector(self) -> Any:
        inspector = SimpleNamespace(execution_context=None)
        inspector.get_engine_information = lambda format_: self._listing(inspector.execution_context is not None)
        return inspector

    def _listing(self, has_context: bool) -> str:
        kernels = json.loads(json.dumps(self._module.kernels))
        if self._module.calls.get("verbosity") != "detailed":
            kernels = [kernel["Name"] for kernel in kernels]
        elif not has_context or self.shapes != {"images": (8, 3, 8, 8)}:
            for tensor in [t for kernel in kernels for t in kernel.get("Inputs", [])]:
                tensor["Format/Datatype"] = "N/A due to dynamic shapes"
        return json.dumps({"Layers": kernels, "Bindings": ["images", "logits"]})


class _Config:
    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        self.progress_monitor: Any = None

    @property
    def profiling_verbosity(self) -> str:
        return str(self._module.calls["verbosity"])

    @profiling_verbosity.setter
    def profiling_verbosity(self, verbosity: str) -> None:
        self._module.calls["verbosity"] = verbosity

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self._module.calls["workspace"] = (pool, size)

    @property
    def builder_optimization_level(self) -> int:
        return int(self._module.calls["level"])

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        self._module.calls["level"] = level

    def create_timing_cache(self, serialized: bytes) -> Any:
        if self._module.fail == "cache" and serialized:
            self._module.log.log(Severity.WARNING, "Unable to load timing cache: it is of another version")
            return None
        self._module.calls.setdefault("caches", []).append(serialized)
        return SimpleNamespace(serialize=lambda: serialized + b"+timed")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return not ignore_mismatch

    def add_optimization_profile(self, profile: Any) -> int:
        return -1 if self._module.fail == "profile" else 0
