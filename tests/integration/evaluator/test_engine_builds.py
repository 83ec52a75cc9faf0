"""What becomes of builds that cannot go well, at a real server: a clear answer, and nothing half-written."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import grpc
import onnx
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from granq.v1 import artifacts_pb2, common_pb2, evaluator_pb2, evaluator_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from services.common.artifacts import ArtifactStore
from services.evaluator import runtimes
from tests.support.disks import on_a_small_disk
from tests.support.evaluator_server import Evaluator, key, running_evaluator
from tests.support.hostile_graphs import float_weights, outside, truncated, unknown
from tests.support.onnx_graphs import quantized
from tests.support.servers import ServerProcess
from tests.support.waiting import eventually, is_gone

RTX = common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT_RTX)
Code = grpc.StatusCode
needs_rtx = pytest.mark.skipif(runtimes.TENSORRT_RTX.version() is None, reason="tensorrt-rtx is not installed")
# Says that it builds, and never ends.
ENDLESS = """
import sys, threading

class Endless(FakeTensorRT):
    def _build(self, network, config):
        config.progress_monitor.phase_start("Building Engine", None, 2)
        threading.Event().wait()

sys.modules[__name__] = Endless("1.7.1")
"""


@pytest.fixture
async def evaluator(tmp_path: Path) -> AsyncIterator[Evaluator]:
    async with running_evaluator(tmp_path, max_running_jobs=2) as running:
        yield running


def stored(folder: Path) -> set[str]:
    """Return the names of all blobs of a store, and of what is on its way in."""
    return {path.name for part in ("blobs", "tmp") for path in (folder / part).rglob("*") if path.is_file()}


async def test_a_cancelled_build_leaves_no_process_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = (Path(__file__).parents[2] / "support" / "fake_tensorrt.py").read_text()
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tensorrt_rtx.py").write_text(fake + ENDLESS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    async with running_evaluator(tmp_path) as evaluator:
        onnx_trt = evaluator.put()
        request = evaluator_pb2.StartBuildEngineRequest(key=key("b"), onnx_trt=onnx_trt, target=RTX)
        before = stored(tmp_path / "artifacts")
        await evaluator.calls.StartBuildEngine(request)
        building: list[int] = []
        job = jobs_pb2.Job()
        async for event in evaluator.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id="b")):
            job = event.job
            if job.progress.phase == "building: Building Engine" and not building:
                (build,) = (p for p in psutil.Process().children(recursive=True) if "build_process" in str(p.cmdline()))
                building = [build.pid, build.ppid()]
                assert list(temporary.rglob("granq-build-*"))
                await evaluator.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id="b"))
        assert job.state == jobs_pb2.JOB_STATE_CANCELLED, job.failure
        await eventually(lambda: all(is_gone(pid) for pid in building))
        assert building
        assert list(temporary.iterdir()) == []
        assert stored(tmp_path / "artifacts") == before


BAD: dict[Callable[[onnx.ModelProto], bytes], tuple[Code, str, str]] = {
    truncated: (Code.INVALID_ARGUMENT, "onnx_trt", "not a readable ONNX file"),
    unknown: (Code.INVALID_ARGUMENT, "onnx_trt", "NoSuchOperation"),
    outside: (Code.INVALID_ARGUMENT, "onnx_trt", "save it as one file"),
    float_weights: (Code.FAILED_PRECONDITION, "onnx_trt", "conv2_sums"),
}


@needs_rtx
async def test_graphs_that_cannot_be_built_are_told_by_field(evaluator: Evaluator, tmp_path: Path) -> None:
    expected = {make.__name__: told for make, told in BAD.items()}
    artifacts = {make.__name__: evaluator.store.put_bytes(make(quantized())) for make in BAD}
    # A digest that nothing has, and one whose bytes are no longer those that it stands for.
    artifacts["absent"] = artifacts_pb2.Artifact(digest="sha256:" + "0" * 64)
    expected["absent"] = (Code.NOT_FOUND, "onnx_trt", "does not hold sha256:0000")
    artifacts["flipped"] = evaluator.put(seed=1)
    path = ArtifactStore(evaluator.store.url).local_path(artifacts["flipped"].digest)
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    expected["flipped"] = (Code.DATA_LOSS, "onnx_trt", "store the artifact again")
    before = stored(tmp_path / "artifacts")
    for name, artifact in artifacts.items():
        await evaluator.calls.StartBuildEngine(
            evaluator_pb2.StartBuildEngineRequest(key=key(name), onnx_trt=artifact, target=RTX)
        )
    for name, (job, _) in zip(artifacts, await asyncio.gather(*map(evaluator.ended, artifacts)), strict=True):
        code, field, words = expected[name]
        assert (job.failure.code, job.failure.field) == (code.value[0], field), (name, job)
        assert words in job.failure.message, name
    assert stored(tmp_path / "artifacts") == before


@pytest.mark.parametrize(
    ("batch", "field"),
    [((8, 4, 2), "target.batch"), ((0, 1, 2), "target.batch.min"), ((1, 8, 5000), "target.batch.max")],
)
async def test_impossible_batches_are_refused_by_field(
    evaluator: Evaluator, batch: tuple[int, int, int], field: str
) -> None:
    target = common_pb2.EngineTarget(batch=common_pb2.BatchProfile(min=batch[0], opt=batch[1], max=batch[2]))
    request = evaluator_pb2.StartBuildEngineRequest(key=key("b"), onnx_trt=evaluator.put(), target=target)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await evaluator.calls.StartBuildEngine(request)
    assert caught.value.code() == Code.INVALID_ARGUMENT
    status = rpc_status.from_call(cast(grpc.Call, caught.value))
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert [violation.field for violation in bad.field_violations] == [field]


@needs_rtx
@pytest.mark.parametrize("full", ["temporary", "artifacts"])
async def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    for folder in ("temporary", "artifacts"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    server = ServerProcess("evaluator", tmp_path, prefix=on_a_small_disk(tmp_path / full)).start()
    try:
        seen = Path(f"/proc/{server.pid}/root{tmp_path}")  # the folder as the server sees it
        onnx_trt = ArtifactStore((seen / "artifacts").as_uri()).put_bytes(quantized().SerializeToString())
        before = stored(seen / "artifacts")
        request = evaluator_pb2.StartBuildEngineRequest(key=key("b"), onnx_trt=onnx_trt, target=RTX)
        async with grpc.aio.insecure_channel(server.address) as channel:
            await evaluator_pb2_grpc.EvaluatorServiceStub(channel).StartBuildEngine(request)
            watched = jobs_pb2_grpc.JobServiceStub(channel).WatchJob(jobs_pb2.WatchJobRequest(job_id="b"))
            job = [event.job async for event in watched][-1]
        assert (job.failure.code, job.failure.reason) == (Code.RESOURCE_EXHAUSTED.value[0], "DISK_FULL"), job
        assert "free space" in job.failure.message
        assert stored(seen / "artifacts") == before
        assert list((seen / "temporary").iterdir()) == []
    finally:
        assert server.stop() == 0
