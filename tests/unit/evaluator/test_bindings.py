"""What builds and runs use of the runtimes' Python API, held against the real bindings.

TensorRT-RTX is installed with its libraries. Of TensorRT, PyPI has the bindings without the libraries; they are loaded
here against empty ones that a compiler makes, which is enough to ask for names and signatures, and for what happens
when the library gives nothing.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [ROOT / "services/evaluator" / name for name in ("build_process.py", "engine_model.py")]
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
ENTRIES = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
CALLS = {
    "Builder.build_serialized_network": "(self: Builder, network: INetworkDefinition, config: IBuilderConfig)",
    "Builder.create_builder_config": "(self: Builder) -> IBuilderConfig",
    "Builder.create_network": "(self: Builder, flags: typing.SupportsInt = 0) -> INetworkDefinition",
    "Builder.create_optimization_profile": "(self: Builder) -> IOptimizationProfile",
    "IBuilderConfig.add_optimization_profile": "(self: IBuilderConfig, profile: IOptimizationProfile) -> int",
    "IBuilderConfig.create_timing_cache": "(self: IBuilderConfig, serialized_timing_cache: typing_extensions.Buffer)",
    "IBuilderConfig.set_memory_pool_limit": (
        "(self: IBuilderConfig, pool: MemoryPoolType, pool_size: typing.SupportsInt) -> None"
    ),
    "IBuilderConfig.set_timing_cache": "(self: IBuilderConfig, cache: ITimingCache, ignore_mismatch: bool) -> bool",
    "ICudaEngine.create_execution_context": "(self: ICudaEngine, strategy: ExecutionContextAllocationStrategy = ",
    "ICudaEngine.get_tensor_dtype": "(self: ICudaEngine, name: str) -> DataType",
    "ICudaEngine.get_tensor_mode": "(self: ICudaEngine, name: str) -> TensorIOMode",
    "ICudaEngine.get_tensor_name": "(self: ICudaEngine, index: typing.SupportsInt) -> str",
    "ICudaEngine.get_tensor_shape": "(self: ICudaEngine, name: str) -> Dims",
    "IExecutionContext.execute_async_v3": "(self: IExecutionContext, stream_handle: typing.SupportsInt) -> bool",
    "IExecutionContext.set_input_shape": "(self: IExecutionContext, name: str, shape: tuple) -> bool",
    "IExecutionContext.set_tensor_address": "(self: IExecutionContext, name: str, memory: typing.SupportsInt) -> bool",
    "INetworkDefinition.get_input": "(self: INetworkDefinition, index: typing.SupportsInt) -> ITensor",
    "INetworkDefinition.get_output": "(self: INetworkDefinition, index: typing.SupportsInt) -> ITensor",
    "IOptimizationProfile.set_shape": "(self: IOptimizationProfile, input: str, min: Dims, opt: Dims, max: Dims)",
    "IProgressMonitor.phase_finish": "(self: IProgressMonitor, phase_name: str) -> None",
    "IProgressMonitor.phase_start": (
        "(self: IProgressMonitor, phase_name: str, parent_phase: str, num_steps: typing.SupportsInt) -> None"
    ),
    "IProgressMonitor.step_complete": ("(self: IProgressMonitor, phase_name: str, step: typing.SupportsInt) -> bool"),
    "ITimingCache.serialize": "(self: ITimingCache) -> IHostMemory",
    "OnnxParser.get_error": "(self: OnnxParser, index: typing.SupportsInt) -> ",
    "OnnxParser.parse": "(self: OnnxParser, model: typing_extensions.Buffer, path: str = None) -> bool",
    "ParserError.desc": "(self: ParserError) -> str",
    "Runtime.deserialize_cuda_engine": "(self: Runtime, serialized_engine: typing_extensions.Buffer) -> ICudaEngine",
}
VALUES = (
    "DataType.FLOAT",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.progress_monitor",
    "ICudaEngine.num_io_tensors",
    "ILogger.ERROR",
    "ILogger.INTERNAL_ERROR",
    "ILogger.WARNING",
    "INetworkDefinition.num_inputs",
    "INetworkDefinition.num_outputs",
    "ITensor.dtype",
    "ITensor.name",
    "ITensor.shape",
    "MemoryPoolType.WORKSPACE",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.num_errors",
    "TensorIOMode.INPUT",
    "__version__",
)
RTX_CALLS = {
    "IBuilderConfig.set_compute_capability": (
        "(self: IBuilderConfig, compute_capability: ComputeCapability, index: typing.SupportsInt)"
    ),
}
RTX_VALUES = ("ComputeCapability.SM89", "ComputeCapability.SM120", "IBuilderConfig.num_compute_capabilities")
# Names that are Python's or this project's own, not the runtimes'.
OTHERS = {"errors", "warnings", "log", "messages"}

ASK = """
import importlib, json, sys
module, names = sys.argv[1], json.loads(sys.stdin.read())
trt = importlib.import_module(module)
found = {}
for name in names:
    value = trt
    for part in name.split("."):
        value = getattr(value, part, None)
    found[name] = None if value is None else (value.__doc__ or "")
json.dump(found, sys.stdout)
"""
REFUSE = """
import sys, tensorrt_bindings
from pathlib import Path
sys.modules["tensorrt"] = tensorrt_bindings
from granq.v1 import common_pb2, reports_pb2
from services.common.errors import FailedPreconditionError
from services.evaluator.build_process import build
from services.evaluator.build_spec import BuildSpec
from services.evaluator.engine_model import EngineModel

class Gpu:
    stream = 0
    def used_bytes(self): return 0

try:
    build(BuildSpec("tensorrt", [10], "", "", [1, 1, 1], [], None, None), print)
except FailedPreconditionError as error:
    print("build:", error.message)
try:
    EngineModel(b"", reports_pb2.EngineManifest(runtime=common_pb2.RUNTIME_TENSORRT), Gpu())
except FailedPreconditionError as error:
    print("run:", error.message)
"""


def python(code: str, *arguments: str, given: str = "", libraries: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input=given, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(module: str, calls: dict[str, str], values: tuple[str, ...], libraries: Path | None = None) -> None:
    found = json.loads(python(ASK, module, given=json.dumps([*calls, *values]), libraries=libraries))
    assert [name for name in values if found[name] is None] == []
    for name, signature in calls.items():
        assert found[name] is not None, name
        # The module's own types are written with its path, and the bindings of two products differ in nothing else.
        plain = re.sub(r"\b\w+_bindings\.\w+\.", "", found[name])
        assert signature in plain, f"{name}: {plain[:400]}"


@pytest.fixture(scope="module")
def empty_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or found.origin is None:
        pytest.skip("TensorRT's bindings are not installed: pip install tensorrt_cu13_bindings")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make empty libraries with")
    needed = set(re.findall(rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+", _binary(Path(found.origin))))
    folder = tmp_path_factory.mktemp("libraries")
    code = "\n".join(f"void* {entry}(void) {{ return 0; }}" for entry in ENTRIES)
    for name in sorted(name.decode() for name in needed):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=code, text=True, check=True)
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == set(LIBRARIES)
    return folder


def _binary(package: Path) -> bytes:
    (library,) = package.parent.glob("tensorrt*.so")
    return library.read_bytes()


def test_tensorrt_has_what_is_used_of_it(empty_libraries: Path) -> None:
    check("tensorrt_bindings", CALLS, VALUES, empty_libraries)


def test_tensorrt_that_cannot_start_is_told_from_a_defect(empty_libraries: Path) -> None:
    build, run = python(REFUSE, libraries=empty_libraries).splitlines()
    assert build.startswith("build: the runtime cannot start here")
    assert re.match(r"run: tensorrt 1\d\.\S+ cannot start", run)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: pip install tensorrt-rtx"
)
def test_tensorrt_rtx_has_what_is_used_of_it() -> None:
    check("tensorrt_rtx", CALLS | RTX_CALLS, (*VALUES, *RTX_VALUES))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_else_is_used(source: Path) -> None:
    checked = {part for name in (*CALLS, *VALUES, *RTX_CALLS, *RTX_VALUES) for part in name.split(".")}
    owners = ("trt", "builder", "network", "parser", "config", "profile", "cache", "tensor")
    private = ("_runtime", "_engine", "_context")
    used = {
        node.attr
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id in owners)
            or (isinstance(node.value, ast.Attribute) and node.value.attr in private)
        )
    }
    assert used
    assert used - checked - OTHERS == {"__members__"} & used
