"""The model repository in the bundle, read with Triton's own definition of its configuration."""

import importlib.util
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from granq.v1 import common_pb2, coordinator_pb2, reports_pb2
from services.common.artifacts import ArtifactStore
from services.coordinator.bundle import build_report
from services.coordinator.triton import serving_files
from tests.support.pipelines import artifact, results, spec


def engine(**changes: Any) -> reports_pb2.EngineManifest:
    """Return the manifest of a TensorRT engine."""
    made = reports_pb2.EngineManifest(
        engine=artifact("7"),
        runtime=common_pb2.RUNTIME_TENSORRT,
        batch=common_pb2.BatchProfile(min=1, opt=4, max=16),
        tensors=[
            reports_pb2.EngineTensor(name="out", data_type="FLOAT", shape=[-1, 10]),
            reports_pb2.EngineTensor(name="in", input=True, data_type="FLOAT", shape=[-1, 3, 32, 32]),
        ],
    )
    made.MergeFrom(reports_pb2.EngineManifest(**changes))
    return made


def configs(made: coordinator_pb2.PipelineResults) -> dict[str, bytes]:
    return {path.split("/")[1]: c for path, c, _ in serving_files(made) if isinstance(c, bytes) and "pbtxt" in path}


@pytest.fixture(scope="module")
def parse() -> Any:
    """Return a function that reads a configuration by Triton's proto."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("Triton's proto is not installed: pip install tritonclient")
    # Its package imports a client that wants more than it installs; the definition stands alone.
    path = Path(package.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    module_spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return lambda text: text_format.Parse(text.decode(), module.ModelConfig())


def test_configurations_are_tritons(store: ArtifactStore, parse: Any) -> None:
    made = results(store)
    made.engines.add(target=common_pb2.EngineTarget(name="jetson-orin.nano")).engine.manifest.CopyFrom(engine())
    found = {name: parse(text) for name, text in configs(made).items()}
    assert list(found) == ["model_onnx", "model_engine_3_jetson-orin_nano"]
    expected = {
        "model_onnx": ("onnxruntime", 64, "images", "logits", "KIND_CPU", [8], [8, 64]),
        "model_engine_3_jetson-orin_nano": ("tensorrt", 16, "in", "out", "KIND_GPU", [4], [4, 16]),
    }
    for name, config in found.items():
        (source,), (target,), (group,) = config.input, config.output, config.instance_group
        kind = type(group).Kind.Name(group.kind)
        assert config.name == name
        assert (
            config.backend,
            config.max_batch_size,
            source.name,
            target.name,
            kind,
            list(config.dynamic_batching.preferred_batch_size),
            [warm_up.batch_size for warm_up in config.model_warmup],
        ) == expected[name]
        assert (list(source.dims), list(target.dims)) == ([3, 32, 32], [10])
        for warm_up in config.model_warmup:
            ((key, tensor),) = warm_up.inputs.items()
            assert (key, list(tensor.dims), tensor.data_type) == (source.name, [3, 32, 32], source.data_type)
            assert tensor.zero_data


def test_batches_are_those_of_the_cpu_target(store: ArtifactStore, parse: Any) -> None:
    made = results(store)
    cpu = made.engines.add(target=common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_ONNXRUNTIME))
    cpu.graph.CopyFrom(made.export.onnx_ort)
    cpu.target.batch.MergeFrom(common_pb2.BatchProfile(min=1, opt=1, max=1))
    config = parse(configs(made)["model_onnx"])
    assert (config.max_batch_size, [w.batch_size for w in config.model_warmup]) == (1, [1])


def test_what_the_readme_adds_for_old_processors_is_a_configuration(store: ArtifactStore, parse: Any) -> None:
    made = results(store)
    files = {path: content for path, content, _ in serving_files(made)}
    readme, config = files["triton/README.md"], files["triton/model_onnx/config.pbtxt"]
    assert isinstance(readme, bytes)
    assert isinstance(config, bytes)
    (line,) = re.findall(r"^    (optimization .*)$", readme.decode(), re.MULTILINE)
    # Level 2 is what Triton's backend makes ORT_DISABLE_ALL of, under which model_trt.onnx is exact.
    assert parse(config + line.encode()).optimization.graph.level == 2


@pytest.mark.parametrize(
    "changes", [{"runtime": common_pb2.RUNTIME_TENSORRT_RTX}, {"batch": common_pb2.BatchProfile(min=4)}]
)
def test_engines_that_triton_cannot_serve_are_left_out(store: ArtifactStore, changes: dict[str, Any]) -> None:
    made = results(store)
    made.engines.add().engine.manifest.CopyFrom(engine(**changes))
    assert list(configs(made)) == ["model_onnx"]


def test_without_graphs_there_is_nothing_to_serve(store: ArtifactStore) -> None:
    made = results(store)
    made.ClearField("export")
    assert serving_files(made) == []


def test_the_repository_lies_in_the_bundle(store: ArtifactStore) -> None:
    made = coordinator_pb2.Pipeline(pipeline_id="p", spec=spec(), results=results(store))
    manifest = engine()
    manifest.engine.CopyFrom(store.put_bytes(b"plan"))
    record = reports_pb2.EngineBuildResult(manifest=manifest, manifest_file=store.put_bytes(b"{}"))
    made.results.engines.add().engine.CopyFrom(record)
    with zipfile.ZipFile(store.local_path(build_report(store, made).bundle.digest)) as bundle:
        names = sorted(name for name in bundle.namelist() if name.startswith("triton/"))
        assert names == [
            "triton/README.md",
            "triton/model_engine_3_tensorrt/1/model.plan",
            "triton/model_engine_3_tensorrt/config.pbtxt",
            "triton/model_onnx/1/model.onnx",
            "triton/model_onnx/config.pbtxt",
        ]
        assert bundle.read("triton/model_onnx/1/model.onnx") == b"ort"
        assert bundle.read("triton/model_engine_3_tensorrt/1/model.plan") == b"plan"
        assert "`triton/model_onnx/config.pbtxt`" in bundle.read("report.md").decode()
