"""One job through all kinds of trouble, against workers that follow a script."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from granq.v1 import common_pb2, coordinator_pb2, jobs_pb2, reports_pb2
from services.common.errors import (
    AbortedError,
    DataLossError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.coordinator import runner as runner_module
from services.coordinator.relay import ProgressRelay
from services.coordinator.requests import JobCall, Stage, stage_calls
from services.coordinator.runner import JobRunner, Patience
from services.coordinator.transitions import JobCursor, SupersededError
from tests.support.pipelines import spec

RUNNING, SUCCEEDED = jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_SUCCEEDED
FAILED, CANCELLED = jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED
CALL = stage_calls(Stage.STAGE_VALIDATE, coordinator_pb2.Pipeline(pipeline_id="p", spec=spec()))[0]
RESULT = jobs_pb2.JobResult(inspection=reports_pb2.ModelSummary(num_classes=10))


def _job(state: jobs_pb2.JobState, step: int | None = None, code: int = 0, reason: str = "") -> jobs_pb2.Job:
    job = jobs_pb2.Job(state=state)
    if step is not None:
        job.progress.phase, job.progress.step = "training", step
    if state == FAILED:
        job.failure.CopyFrom(common_pb2.Failure(code=code, reason=reason, message="told by the worker"))
    if state == SUCCEEDED:
        job.result.CopyFrom(RESULT)
    return job


DIED = _job(FAILED, code=14, reason="JOB_PROCESS_DIED")
AWAY = UnavailableError("away")
BUSY = ResourceExhaustedError("busy", reason="WORKER_BUSY")
FORGOTTEN = NotFoundError("forgotten")
Scene = Sequence[jobs_pb2.Job | Exception]


class ScriptedWorkers:
    """Each start plays the next scene: a list of jobs (events of the watch) and errors."""

    def __init__(self, *scenes: Scene) -> None:
        self.scenes = list(scenes)
        self.watches: list[tuple[str, int]] = []
        self.current: list[jobs_pb2.Job | Exception] = []
        self.run = 0
        self.sequence = 0
        self.last = _job(RUNNING)

    async def start(self, call: JobCall) -> jobs_pb2.Job:
        self.run, self.sequence = self.run + 1, 0
        self.current = list(self.scenes.pop(0))
        if self.current and isinstance(self.current[0], Exception):
            raise self.current.pop(0)  # type: ignore[misc]
        self.last = _job(RUNNING)
        return self.last

    async def get(self, worker: str, job_id: str) -> jobs_pb2.Job:
        return self.last

    async def watch(
        self, worker: str, job_id: str, run_id: str, sequence: int
    ) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        self.watches.append((run_id, sequence))
        while self.current:
            item = self.current.pop(0)
            if isinstance(item, TimeoutError):
                return  # the stream's time is up
            if isinstance(item, Exception):
                raise item
            self.sequence += 1
            self.last = item
            yield jobs_pb2.WatchJobResponse(run_id=f"run{self.run}", sequence=self.sequence, job=item)

    async def cancel(self, worker: str, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        raise AssertionError


class Case:
    """A runner with everything around it."""

    def __init__(self, *scenes: Scene, patience: float = 60, crashes: int = 3) -> None:
        self.workers = ScriptedWorkers(*scenes)
        self.told: list[str] = []
        self.steps: list[int] = []
        self.wanted = True
        self.runner = JobRunner(
            self.workers,
            CALL,
            Patience(patience, crashes),
            ProgressRelay(self._write),
            self._announce,
            self._check,
            JobCursor("run1", 2),
        )

    async def _write(self, progress: jobs_pb2.Progress, _cursor: JobCursor) -> None:
        self.steps.append(progress.step)

    async def _announce(self, cause: common_pb2.Failure) -> None:
        self.told.append(cause.reason)

    async def _check(self) -> None:
        if not self.wanted:
            raise SupersededError


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(runner_module, "_LAST_DELAY", 0.002)


async def test_a_quiet_job_returns_its_result_and_reads_on_from_the_cursor() -> None:
    case = Case([_job(RUNNING, 1), _job(SUCCEEDED, 2)])
    assert await case.runner.run() == RESULT
    assert case.workers.watches == [("run1", 2)]
    assert case.told == []


async def test_a_long_job_is_watched_in_several_streams() -> None:
    case = Case([_job(RUNNING, 1), _job(RUNNING, 2), TimeoutError(), _job(SUCCEEDED, 3)])
    assert await case.runner.run() == RESULT
    assert case.workers.watches == [("run1", 2), ("run1", 2)]


async def test_an_outage_is_told_once_and_outlived() -> None:
    case = Case([AWAY], [AWAY], [_job(RUNNING, 1), AWAY], [_job(RUNNING, 2), FORGOTTEN], [_job(SUCCEEDED)])
    assert await case.runner.run() == RESULT
    assert case.told == ["UNAVAILABLE", "UNAVAILABLE", "WORKER_RESTARTED"]
    assert case.workers.watches[1] == ("run3", 1)


async def test_deaths_with_progress_between_them_are_outlived() -> None:
    case = Case(*([_job(RUNNING, step), DIED] for step in range(1, 9)), [_job(SUCCEEDED)])
    assert await case.runner.run() == RESULT
    assert case.told == ["JOB_PROCESS_DIED"] * 8


async def test_deaths_at_the_same_step_end_the_job() -> None:
    # The runs after the first repeat steps that were seen before; that is no progress.
    case = Case(*([_job(RUNNING, 1), _job(RUNNING, 2), DIED] for _ in range(9)))
    with pytest.raises(UnavailableError, match="died 3 times"):
        await case.runner.run()
    assert len(case.workers.scenes) == 6
    assert case.told == ["JOB_PROCESS_DIED"] * 2


@pytest.mark.parametrize(
    ("scene", "error"),
    [
        ([_job(FAILED, code=15, reason="CHECKPOINT_DAMAGED")], DataLossError),
        ([_job(CANCELLED)], AbortedError),
        ([DataLossError("refused at start")], DataLossError),
        ([ResourceExhaustedError("too large")], ResourceExhaustedError),
    ],
)
async def test_other_failures_end_the_job_at_once(scene: Scene, error: type[Exception]) -> None:
    case = Case(scene)
    with pytest.raises(error):
        await case.runner.run()


async def test_patience_ends() -> None:
    case = Case(*([AWAY] for _ in range(1000)), patience=0.05)
    with pytest.raises(UnavailableError, match="no progress"):
        await asyncio.wait_for(case.runner.run(), 10)
    assert case.told == ["UNAVAILABLE"]


async def test_a_busy_worker_is_waited_for_beyond_all_patience_and_told_once() -> None:
    case = Case(*([BUSY] for _ in range(100)), [_job(SUCCEEDED)], patience=0.01)
    assert await case.runner.run() == RESULT
    assert case.told == ["WORKER_BUSY"]


async def test_jobs_that_fail_as_unavailable_are_repeated_until_patience_ends() -> None:
    busy = _job(FAILED, code=14, reason="GENERATOR_UNAVAILABLE")
    case = Case(*([_job(RUNNING, 1), busy] for _ in range(1000)), patience=0.05)
    with pytest.raises(UnavailableError, match="no progress"):
        await asyncio.wait_for(case.runner.run(), 10)


async def test_a_job_that_is_no_longer_wanted_is_not_started_again() -> None:
    case = Case([AWAY], [_job(SUCCEEDED)])
    case.wanted = False
    with pytest.raises(SupersededError):
        await case.runner.run()
    assert len(case.workers.scenes) == 1
