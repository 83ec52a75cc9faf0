"""Reading files from outside is bounded in memory and time, in a process whose end says what file it was."""

import errno
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from granq.v1 import common_pb2, generator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import CODES, InvalidArgumentError, UnavailableError, as_granq_error, is_out_of_memory
from services.common.errors import ResourceExhaustedError as Exhausted
from services.common.jobs import JobManager
from services.common.jobs.reading import death_while_reading
from services.common.settings import MIB, ServerSettings
from tests.support import job_functions

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[JobManager]:
    url = (tmp_path / "store").as_uri()
    settings = ServerSettings(artifact_url=url, read_seconds=1, read_memory_bytes=256 * MIB)
    manager = JobManager(ArtifactStore(url), settings, {"reads": f"{job_functions.__name__}:reads"}, 2)
    yield manager
    await manager.close(0)


async def outcome(manager: JobManager, file: str) -> jobs_pb2.Job:
    key = jobs_pb2.JobKey(job_id=file)
    request = generator_pb2.StartSynthesizeRequest(key=key, model=common_pb2.ModelSource(architecture=file))
    await manager.start("reads", key, request)
    events = [event async for event in manager.watch(file)]
    return events[-1].job


@pytest.mark.parametrize(
    ("file", "error", "reason", "words"),
    [
        ("hangs", Exhausted, "READ_TIME", "more than 1 s; if the file is what it should be, raise GRANQ_READ_SECONDS"),
        ("fills", Exhausted, "READ_MEMORY", "raise GRANQ_READ_MEMORY_BYTES"),
        ("fills_hidden", Exhausted, "READ_MEMORY", "more than 268435456 bytes and 6 times its size"),
        ("crashes", InvalidArgumentError, "READ_CRASHED", "SIGSEGV"),
        ("aborts", InvalidArgumentError, "READ_CRASHED", "SIGABRT"),
        ("refused", InvalidArgumentError, "INVALID_ARGUMENT", "no model"),
    ],
)
async def test_a_hostile_file_is_told_by_its_field(
    manager: JobManager, file: str, error: type[Exhausted], reason: str, words: str
) -> None:
    failure = (await outcome(manager, file)).failure
    assert (failure.code, failure.reason, failure.field) == (CODES[error], reason, "model.artifact")
    assert words in failure.message


async def test_limits_end_with_the_reading(manager: JobManager) -> None:
    job = await outcome(manager, "good")
    assert job.result.synthesis.num_images == 1  # a gibibyte, which reading might not have taken


async def test_who_is_killed_while_reading_may_try_again(manager: JobManager) -> None:
    failure = (await outcome(manager, "killed")).failure
    assert (failure.code, failure.reason) == (CODES[UnavailableError], "JOB_PROCESS_DIED")


def test_an_end_behind_the_reading_says_nothing_of_the_file() -> None:
    assert death_while_reading(-signal.SIGSEGV, "", 1) is None
    assert death_while_reading(1, "dataset", 1) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_ran_out_is_known_by_any_name(error: Exception) -> None:
    told = ValueError("damaged")
    told.__cause__ = error
    assert is_out_of_memory(told)
    assert not is_out_of_memory(ValueError("damaged"))


def test_memory_of_torch_is_the_hosts() -> None:
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")
    known = as_granq_error(error)
    assert known is not None
    assert known.reason == "OUT_OF_MEMORY"
