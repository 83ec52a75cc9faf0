"""What this project uses of the runtimes' Python API, and what bindings have of it.

PyPI has the bindings of every TensorRT from 10.0 on, without their libraries. They load against empty libraries that a
compiler makes, which is enough to ask for names and signatures. What older versions answered is kept in
tests/data/tensorrt_api.json, because one environment holds one version:

    python -m tests.support.tensorrt_api tensorrt_cu12_bindings==10.3.0 tensorrt_cu13_bindings==11.0.0.114 …

downloads the named ones (1 MB each) and writes the file anew.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "data" / "tensorrt_api.json"
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
    "Builder.create_network": "(self: Builder, flags: int = 0) -> INetworkDefinition",
    "Builder.create_optimization_profile": "(self: Builder) -> IOptimizationProfile",
    "EngineInspector.get_engine_information": "(self: EngineInspector, format: LayerInformationFormat) -> str",
    "IBuilderConfig.add_optimization_profile": "(self: IBuilderConfig, profile: IOptimizationProfile) -> int",
    "IBuilderConfig.create_timing_cache": "(self: IBuilderConfig, serialized_timing_cache: buffer)",
    "IBuilderConfig.set_memory_pool_limit": ("(self: IBuilderConfig, pool: MemoryPoolType, pool_size: int) -> None"),
    "IBuilderConfig.set_timing_cache": "(self: IBuilderConfig, cache: ITimingCache, ignore_mismatch: bool) -> bool",
    "ICudaEngine.create_engine_inspector": "(self: ICudaEngine) -> EngineInspector",
    "ICudaEngine.create_execution_context": "(self: ICudaEngine, strategy: ExecutionContextAllocationStrategy = ",
    "ICudaEngine.get_tensor_dtype": "(self: ICudaEngine, name: str) -> DataType",
    "ICudaEngine.get_tensor_mode": "(self: ICudaEngine, name: str) -> TensorIOMode",
    "ICudaEngine.get_tensor_name": "(self: ICudaEngine, index: int) -> str",
    "ICudaEngine.get_tensor_shape": "(self: ICudaEngine, name: str) -> Dims",
    "IExecutionContext.execute_async_v3": "(self: IExecutionContext, stream_handle: int) -> bool",
    "IExecutionContext.set_input_shape": "(self: IExecutionContext, name: str, shape: tuple) -> bool",
    "IExecutionContext.set_tensor_address": "(self: IExecutionContext, name: str, memory: int) -> bool",
    "INetworkDefinition.get_input": "(self: INetworkDefinition, index: int) -> ITensor",
    "INetworkDefinition.get_output": "(self: INetworkDefinition, index: int) -> ITensor",
    "IOptimizationProfile.set_shape": "(self: IOptimizationProfile, input: str, min: Dims, opt: Dims, max: Dims)",
    "IProgressMonitor.phase_finish": "(self: IProgressMonitor, phase_name: str) -> None",
    "IProgressMonitor.phase_start": (
        "(self: IProgressMonitor, phase_name: str, parent_phase: str, num_steps: int) -> None"
    ),
    "IProgressMonitor.step_complete": ("(self: IProgressMonitor, phase_name: str, step: int) -> bool"),
    "ITimingCache.serialize": "(self: ITimingCache) -> IHostMemory",
    "OnnxParser.get_error": "(self: OnnxParser, index: int) -> ",
    "OnnxParser.parse": "(self: OnnxParser, model: buffer, path: str = None) -> bool",
    "ParserError.desc": "(self: ParserError) -> str",
    "Runtime.deserialize_cuda_engine": "(self: Runtime, serialized_engine: buffer) -> ICudaEngine",
}
VALUES = (
    "DataType.FLOAT",
    "EngineInspector.execution_context",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.profiling_verbosity",
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
    "LayerInformationFormat.JSON",
    "Logger.WARNING",
    "MemoryPoolType.WORKSPACE",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.num_errors",
    "ProfilingVerbosity.DETAILED",
    "TensorIOMode.INPUT",
    "__version__",
)
RTX_CALLS = {
    "IBuilderConfig.set_compute_capability": (
        "(self: IBuilderConfig, compute_capability: ComputeCapability, index: int)"
    ),
}
RTX_VALUES = ("ComputeCapability.SM89", "ComputeCapability.SM120", "IBuilderConfig.num_compute_capabilities")
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


def python(code: str, *arguments: str, given: str = "", libraries: Path | None = None, modules: str = "") -> str:
    """Return what a Python program prints.

    Args:
        code: The program.
        arguments: Its arguments.
        given: Its standard input.
        libraries: Folder in which it finds shared libraries first.
        modules: Folder in which it finds modules first.
    """
    paths = [p for p in (modules, str(ROOT), *sys.path) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_empty_libraries(compiler: str, bindings: Path, folder: Path) -> None:
    """Compile what the bindings in a folder want to be linked with; every function in it returns nothing."""
    (library,) = bindings.glob("tensorrt*.so")
    needed = set(re.findall(rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+", library.read_bytes()))
    code = "\n".join(f"void* {entry}(void) {{ return 0; }}" for entry in ENTRIES)
    for name in sorted(name.decode() for name in needed):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=code, text=True, check=True)
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == set(LIBRARIES)


def plain(documentation: str) -> str:
    """Return the signatures in a documentation, without the module's path, as all versions of pybind11 write them."""
    lines = [line for line in documentation.splitlines() if "(self" in line]
    short = re.sub(r"\b\w+_bindings\.\w+\.|\btensorrt\.tensorrt\.", "", "\n".join(lines))
    return short.replace("typing.SupportsInt", "int").replace("typing_extensions.Buffer", "buffer")


def ask(module: str, names: list[str], libraries: Path | None = None, modules: str = "") -> dict[str, str | None]:
    """Return the signatures of each name of a module, "" for what is no function, None for what is not there."""
    found = json.loads(python(ASK, module, given=json.dumps(names), libraries=libraries, modules=modules))
    return {name: None if text is None else plain(text) for name, text in found.items()}


def main(requirements: list[str]) -> None:
    """Write the record of the named bindings."""
    compiler = shutil.which("cc")
    assert compiler is not None, "there is no C compiler"
    record: dict[str, dict[str, str | None]] = {}
    for requirement in requirements:
        with tempfile.TemporaryDirectory() as folder:
            libraries = Path(folder, "libraries")
            libraries.mkdir()
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
            subprocess.run(command, check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)  # from the registry that the project is installed from
            make_empty_libraries(compiler, Path(folder, "tensorrt_bindings"), libraries)
            names = sorted({*CALLS, *VALUES})
            record[wheel.name.split("-")[1]] = ask("tensorrt_bindings", names, libraries, folder)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
