"""A model repository for NVIDIA's Triton Inference Server: what the bundle holds, ready to be served.

The configuration is protobuf's text format of Triton's model_config.proto, which a test reads it with. Triton loads
TensorRT's engines; it has no backend for those of TensorRT-RTX.
"""

import re

from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2, reports_pb2

FOLDER = "triton"
DEFAULT_BATCH = (1, 8, 64)
# As the exporter names them.
ONNX_INPUT, ONNX_OUTPUT = "images", "logits"
ServingFile = tuple[str, bytes | artifacts_pb2.Artifact, str]
"""Path in the bundle, content, and what it is."""

_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")
_README = """# Model repository for Triton Inference Server

    docker run --rm -p 8000:8000 -p 8001:8001 -v "$PWD:/models:ro" nvcr.io/nvidia/tritonserver:VERSION-py3 \\
        tritonserver --model-repository=/models

`model_onnx` runs the INT8 kernels of ONNX Runtime on the CPU. On x86 CPUs without VNNI these saturate, and classes
change. ONNX Runtime has a session option against it (`session.x64quantprecision`), which Triton's backend does not
pass on. On such a CPU copy `../model_trt.onnx` over `model_onnx/1/model.onnx`, and add to `model_onnx/config.pbtxt`:

    optimization { graph { level: 2 } }

That is exact on every CPU, in floating point, and slower. The others are TensorRT engines: they load only on the GPU
and with the TensorRT version that their manifests in `../engines` name, so take the server's release with that version.
Inputs are float32 N×C×H×W, normalized as for the model that was quantized; outputs are logits. To have class names in
answers, put a `labels.txt` with one name per line beside `config.pbtxt`, and `label_filename: "labels.txt"` into its
output.
"""
_CONFIG = """name: "{name}"
backend: "{backend}"
max_batch_size: {max_batch}
input [
  {{ name: "{input_name}" data_type: TYPE_FP32 dims: [ {dims} ] }}
]
output [
  {{ name: "{output_name}" data_type: TYPE_FP32 dims: [ {classes} ] }}
]
instance_group [
  {{ count: 1 kind: {kind} }}
]
dynamic_batching {{ preferred_batch_size: [ {tuned} ] max_queue_delay_microseconds: 1000 }}
{warm_ups}"""
_WARM_UP = """model_warmup [
  {{
    name: "batch of {batch}"
    batch_size: {batch}
    inputs {{ key: "{input_name}" value {{ data_type: TYPE_FP32 dims: [ {dims} ] zero_data: true }} }}
  }}
]
"""


def serving_files(results: coordinator_pb2.PipelineResults) -> list[ServingFile]:
    """Return the files of the repository; none where nothing was exported.

    An engine whose smallest batch is above 1 is left out: Triton passes on single requests as they are.
    """
    if not results.HasField("export"):
        return []
    shape, classes = list(results.model.input_shape), results.model.num_classes
    profile = next((o.target.batch for o in results.engines if o.WhichOneof("outcome") == "graph"), None)
    batch = (profile.min, profile.opt, profile.max) if profile is not None and profile.max else DEFAULT_BATCH
    config = _config("model_onnx", "onnxruntime", "KIND_CPU", ONNX_INPUT, ONNX_OUTPUT, shape, classes, batch)
    files: list[ServingFile] = [
        (f"{FOLDER}/README.md", _README.encode(), "How to serve this folder with Triton"),
        (f"{FOLDER}/model_onnx/config.pbtxt", config, "Triton: configuration"),
        (f"{FOLDER}/model_onnx/1/model.onnx", results.export.onnx_ort, "Triton: model_ort.onnx"),
    ]
    for number, outcome in enumerate(results.engines, 1):
        manifest = outcome.engine.manifest
        tensors = sorted(manifest.tensors, key=lambda tensor: not tensor.input)
        if manifest.runtime != common_pb2.RUNTIME_TENSORRT or manifest.batch.min != 1 or len(tensors) != 2:
            continue
        name = f"model_engine_{number}_{_NOT_A_NAME.sub('_', outcome.target.name or 'tensorrt')}"
        files.append(
            (f"{FOLDER}/{name}/config.pbtxt", _engine_config(name, manifest, tensors), "Triton: configuration")
        )
        files.append((f"{FOLDER}/{name}/1/model.plan", manifest.engine, "Triton: engine"))
    return files


def _engine_config(name: str, manifest: reports_pb2.EngineManifest, tensors: list[reports_pb2.EngineTensor]) -> bytes:
    source, target = tensors
    batch = (manifest.batch.min, manifest.batch.opt, manifest.batch.max)
    shape, classes = list(source.shape)[1:], target.shape[-1]
    return _config(name, "tensorrt", "KIND_GPU", source.name, target.name, shape, classes, batch)


def _config(
    name: str,
    backend: str,
    kind: str,
    input_name: str,
    output_name: str,
    shape: list[int],
    classes: int,
    batch: tuple[int, int, int],
) -> bytes:
    dims = ", ".join(map(str, shape))
    warm_ups = [_WARM_UP.format(batch=size, input_name=input_name, dims=dims) for size in sorted({batch[1], batch[2]})]
    return _CONFIG.format(
        name=name,
        backend=backend,
        kind=kind,
        max_batch=batch[2],
        input_name=input_name,
        output_name=output_name,
        dims=dims,
        classes=classes,
        tuned=batch[1],
        warm_ups="".join(warm_ups),
    ).encode()
