"""An engine is read under the limits of all files from outside, and told by its field."""

from pathlib import Path

import numpy as np
import pytest

from granq.v1 import artifacts_pb2, common_pb2, evaluator_pb2, jobs_pb2
from services.common.errors import CODES, GranqError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from services.common.jobs import JobManager
from services.common.settings import MIB
from services.evaluator.settings import EvaluatorSettings
from tests.support import hostile_engine
from tests.support.evaluator_bench import EvaluatorBench
from tests.support.fake_engine import engine_manifest
from tests.support.onnx_graphs import images, quantized

pytestmark = pytest.mark.timeout(60)


async def test_an_engine_is_read_under_limits(tmp_path: Path) -> None:
    bench = EvaluatorBench(tmp_path, read_memory_bytes=256 * MIB)
    settings: EvaluatorSettings = bench.context.settings
    np.savez(bench.datasets / "set.npz", images=images(2), labels=np.zeros(2, int))
    graph = bench.put(quantized())
    dataset = common_pb2.Dataset(path="set.npz", format=common_pb2.DATASET_FORMAT_NPZ)
    manager = JobManager(bench.store, settings, {"evaluate": f"{hostile_engine.__name__}:evaluate"}, 3)
    expected: dict[str, tuple[type[GranqError], str]] = {
        "fills": (ResourceExhaustedError, "READ_MEMORY"),
        "crashes": (InvalidArgumentError, "READ_CRASHED"),
        "absent": (NotFoundError, "ARTIFACT_NOT_FOUND"),
    }
    try:
        for name in expected:
            plan = bench.store.put_bytes(name.encode())
            if name == "absent":
                plan = artifacts_pb2.Artifact(digest=f"sha256:{'0' * 64}")
            request = evaluator_pb2.StartEvaluateRequest(
                key=jobs_pb2.JobKey(job_id=name), onnx_float=graph, dataset=dataset, engine=engine_manifest(plan)
            )
            await manager.start("evaluate", request.key, request)
        for name, (error, reason) in expected.items():
            job = [event.job async for event in manager.watch(name)][-1]
            assert job.state == jobs_pb2.JOB_STATE_FAILED
            told = (job.failure.code, job.failure.reason, job.failure.field)
            assert told == (CODES[error], reason, "engine"), job.failure
    finally:
        await manager.close(0)
