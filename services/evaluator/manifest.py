"""Manifests: what an engine is and where it runs."""

from google.protobuf import json_format

from granq.engines.machine import driver_version, find_gpu, platform_name
from granq.v1 import artifacts_pb2, common_pb2, reports_pb2
from services.evaluator.build_spec import BuildOutcome
from services.evaluator.runtimes import EngineRuntime


def make_manifest(
    engine: artifacts_pb2.Artifact,
    onnx_digest: str,
    runtime: EngineRuntime,
    outcome: BuildOutcome,
    batch: common_pb2.BatchProfile,
    capabilities: list[str],
) -> reports_pb2.EngineManifest:
    """Return an engine's manifest.

    Args:
        engine: The stored engine.
        onnx_digest: Digest of the graph that it was built from.
        runtime: What built it.
        outcome: What the build reported.
        batch: The batch profile.
        capabilities: Compute capabilities that were asked for; empty for the runtime's default.
    """
    gpu = find_gpu()
    # A builder that takes no capabilities built for the GPU at hand.
    own = (gpu.compute_capability,) if gpu is not None and not runtime.takes_capabilities else ()
    return reports_pb2.EngineManifest(
        engine=engine,
        onnx_digest=onnx_digest,
        runtime=runtime.runtime,
        runtime_version=outcome.version,
        compute_capabilities=own or capabilities or runtime.capabilities,
        batch=batch,
        tensors=[
            reports_pb2.EngineTensor(name=t.name, input=t.input, data_type=t.data_type, shape=t.shape)
            for t in outcome.tensors
        ],
        platform=platform_name(),
        driver_version=driver_version(),
    )


def to_json(manifest: reports_pb2.EngineManifest) -> bytes:
    """Return the manifest as JSON with the contract's field names, all of them, in a fixed order."""
    text = json_format.MessageToJson(
        manifest, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return text.encode() + b"\n"
