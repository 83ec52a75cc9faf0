"""Asks the evaluator in the same container to measure and to build a TensorRT engine; prints its answers as JSON.

The image's own Python runs it, by the image's own packages.
"""

import json
import os
from collections.abc import Callable

import grpc

from granq.v1 import artifacts_pb2, common_pb2, evaluator_pb2, evaluator_pb2_grpc, jobs_pb2, reports_pb2


def answers(address: str) -> dict[str, str]:
    """Return the version of TensorRT that the evaluator lists, and its answers, each as "CODE: details"."""
    graph = artifacts_pb2.Artifact(digest=f"sha256:{'1' * 64}")
    found: dict[str, str] = {}
    with grpc.insecure_channel(address) as channel:
        stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
        listed = stub.GetCapabilities(evaluator_pb2.GetCapabilitiesRequest(), timeout=30)
        version = next((r.version for r in listed.runtimes if r.runtime == common_pb2.RUNTIME_TENSORRT), "")
        engine = reports_pb2.EngineManifest(
            engine=artifacts_pb2.Artifact(digest=f"sha256:{'2' * 64}"),
            onnx_digest=graph.digest,
            runtime=common_pb2.RUNTIME_TENSORRT,
            runtime_version=version,
            platform=listed.platform,
        )
        requests: dict[str, Callable[[], object]] = {
            "measure": lambda: stub.StartEvaluate(
                evaluator_pb2.StartEvaluateRequest(
                    key=jobs_pb2.JobKey(job_id="measure"), onnx_float=graph, synthetic_set=graph, engine=engine
                ),
                timeout=30,
            ),
            "build": lambda: stub.StartBuildEngine(
                evaluator_pb2.StartBuildEngineRequest(
                    key=jobs_pb2.JobKey(job_id="build"),
                    onnx_trt=graph,
                    target=common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT),
                ),
                timeout=30,
            ),
        }
        for name, call in requests.items():
            try:
                call()
                found[name] = "OK"
            except grpc.RpcError as error:
                found[name] = f"{error.code().name}: {error.details()}"
    return {"version": version, **found}


if __name__ == "__main__":
    print(json.dumps(answers(f"127.0.0.1:{os.environ['GRANQ_PORT']}")))
