"""Temporary files of a job go with its process, however that ends."""

import errno
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from granq.v1 import generator_pb2, jobs_pb2
from services.common.errors import ResourceExhaustedError, UnavailableError
from services.common.jobs import process
from services.common.jobs.process import JobProcess, child_environment
from services.common.jobs.scratch import Scratch, remove_abandoned
from services.common.settings import ServerSettings

FUNCTION = "tests.support.job_functions:leaves_files"


async def spawned(folder: Path, iterations: int) -> JobProcess:
    key = jobs_pb2.JobKey(job_id="job", pipeline_id="pipeline")
    request = generator_pb2.StartSynthesizeRequest(key=key)
    request.synthesis.iterations = iterations
    settings = ServerSettings(artifact_url=(folder / "store").as_uri(), log_level="WARNING")
    return await JobProcess.spawn("test", FUNCTION, key, request, settings, "run")


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
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process, "Scratch", full)
    with pytest.raises(ResourceExhaustedError) as caught:
        await spawned(tmp_path, 0)
    assert caught.value.reason == "DISK_FULL"


def test_folders_of_killed_servers_go_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = """
import sys
from services.common.jobs.scratch import Scratch
made = Scratch()
(made.path / "large").write_bytes(b"x")
print(made.path, flush=True)
sys.stdin.read()
"""
    environment = {**child_environment(), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code]
    servers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    killed, living = (Path(server.stdout.readline().decode().strip()) for server in servers if server.stdout)
    (tmp_path / "granq-job-file").write_text("somebody's file")
    (tmp_path / "granq-job-link").symlink_to(living)
    own = Scratch()
    try:
        servers[0].kill()
        servers[0].wait()
        remove_abandoned()
        assert not killed.exists()
        assert (living / "large").exists()
        assert own.path.exists()
        assert (tmp_path / "granq-job-file").exists()
    finally:
        own.remove()
        for server in servers:
            server.communicate(timeout=30)
    remove_abandoned()
    assert not living.exists()
    assert not own.path.exists()
