"""Temporary files of a job go with its process, however that ends."""

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest

from granq.v1 import generator_pb2, jobs_pb2
from services.common.errors import ResourceExhaustedError, UnavailableError
from services.common.jobs import process
from services.common.jobs.process import JobProcess
from services.common.settings import ServerSettings

FUNCTION = "tests.support.job_functions:leaves_files"


async def spawned(folder: Path, iterations: int) -> JobProcess:
    key = jobs_pb2.JobKey(job_id="job", pipeline_id="pipeline")
    request = generator_pb2.StartSynthesizeRequest(key=key)
    request.synthesis.iterations = iterations
    settings = ServerSettings(artifact_url=(folder / "store").as_uri(), log_level="WARNING")
    return await JobProcess.spawn("test", FUNCTION, key, request, settings)


@pytest.mark.parametrize("killed", [False, True])
async def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told: list[jobs_pb2.Progress] = []
    job = await spawned(tmp_path, int(killed))
    with pytest.raises(UnavailableError) if killed else nullcontext():
        await job.result(told.append)
    (progress,) = told
    assert Path(progress.phase).is_relative_to(tmp_path)
    assert not list(tmp_path.glob("granq-job-*"))


async def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process, "TemporaryDirectory", full)
    with pytest.raises(ResourceExhaustedError) as caught:
        await spawned(tmp_path, 0)
    assert caught.value.reason == "DISK_FULL"
