"""The driver on the real engine and database, with workers that answer at once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from granq.v1 import common_pb2, jobs_pb2, reports_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import (
    DataLossError,
    FailedPreconditionError,
    GranqError,
    InternalError,
    InvalidArgumentError,
)
from services.common.slots import Place
from services.coordinator.bundle import build_report
from services.coordinator.calls import DatabaseCalls
from services.coordinator.devices.pool import Placement, Wait
from services.coordinator.driver import FAILED, SUPERSEDED, PipelineDriver
from services.coordinator.engine import CONTINUE, WorkflowEngine
from services.coordinator.pipeline_jobs import PipelineJobs
from services.coordinator.requests import STAGES, JobCall, Stage
from services.coordinator.runner import Patience
from services.coordinator.threads import Threads
from services.coordinator.transitions import ENDED, State
from tests.support.pipelines import ME, Database, results, spec

SUCCEEDED = jobs_pb2.JOB_STATE_SUCCEEDED


class PromptWorkers:
    """Every job has succeeded by the time it is started, unless it is told to be refused."""

    def __init__(self, store: ArtifactStore) -> None:
        made = results(store)
        engine = next(outcome.engine for outcome in made.engines if outcome.HasField("engine"))
        self._results = {
            "StartInspectRequest": jobs_pb2.JobResult(inspection=made.model),
            "StartSynthesizeRequest": jobs_pb2.JobResult(synthesis=made.synthesis),
            "StartQuantizeRequest": jobs_pb2.JobResult(quantization=made.quantization),
            "StartExportRequest": jobs_pb2.JobResult(export=made.export),
            "StartBuildEngineRequest": jobs_pb2.JobResult(engine=engine),
            "StartEvaluateRequest": jobs_pb2.JobResult(evaluation=made.evaluation),
            "StartSimulateRequest": jobs_pb2.JobResult(evaluation=made.evaluation),
        }
        self.refusals: dict[str, GranqError] = {}
        self.engine_refusal: GranqError | None = None
        self.started: list[str] = []
        self.keys: list[jobs_pb2.JobKey] = []
        self.cancelled: list[str] = []
        self.hangs = False
        self.resume = asyncio.Event()

    async def start(self, call: JobCall) -> jobs_pb2.Job:
        kind = call.request.DESCRIPTOR.name
        self.started.append(kind)
        self.keys.append(call.request.key)
        if self.hangs:
            await self.resume.wait()
        if kind in self.refusals:
            raise self.refusals[kind]
        if call.engine and self.engine_refusal is not None:
            raise self.engine_refusal
        return jobs_pb2.Job(state=SUCCEEDED, result=self._results[kind])

    async def get(self, worker: str, job_id: str) -> jobs_pb2.Job:
        raise AssertionError

    def watch(
        self, worker: str, job_id: str, run_id: str, sequence: int
    ) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        raise AssertionError

    async def cancel(self, worker: str, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        self.cancelled.append(job_id)
        return jobs_pb2.Job(state=SUCCEEDED)


class NoDevices:
    """Every job runs at the configured workers."""

    def __init__(self, workers: PromptWorkers) -> None:
        self._placement = Placement(workers)

    async def acquire(self, call: JobCall, pipeline_id: str, wait: Wait) -> Placement:
        return self._placement

    async def release(self, job_id: str) -> None:
        raise AssertionError("no job has a device")


@pytest.fixture
def workers(store: ArtifactStore) -> PromptWorkers:
    return PromptWorkers(store)


def _jobs(database: Database, workers: PromptWorkers, threads: Threads, **pools: int) -> PipelineJobs:
    return PipelineJobs(
        repository=database.repository,
        transitions=database.transitions,
        calls=DatabaseCalls(threads),
        places=NoDevices(workers),
        running=workers,
        patience=Patience(60, 3),
        pools=pools,
    )


@pytest.fixture
def driver(sqlite: Database, store: ArtifactStore, workers: PromptWorkers, threads: Threads) -> PipelineDriver:
    return PipelineDriver(
        repository=sqlite.repository,
        transitions=sqlite.transitions,
        calls=DatabaseCalls(threads),
        jobs=_jobs(sqlite, workers, threads),
        build_report=partial(build_report, store),
        report_threads=threads,
    )


@asynccontextmanager
async def _engine(database: Database, driver: PipelineDriver) -> AsyncIterator[WorkflowEngine]:
    async def place_of(pipeline_id: str) -> Place:
        return await asyncio.to_thread(database.repository.place, pipeline_id)

    made = WorkflowEngine(
        url=database.url,
        executor_id=ME,
        application_version="1",
        steps=STAGES,
        run_step=driver.run_stage,
        max_running=100,
        place_of=place_of,
    )
    made.launch()
    try:
        yield made
    finally:
        await made.close()


async def test_many_pipelines_at_once_each_keep_their_order(sqlite: Database, driver: PipelineDriver) -> None:
    names = [sqlite.create() for _ in range(25)]
    async with _engine(sqlite, driver) as engine:
        for name in names:
            engine.start(name, 1)
        async with asyncio.timeout(60):
            while sqlite.repository.unfinished():
                await asyncio.sleep(0.05)
    for name in names:
        events = sqlite.repository.events(name, 0, 100)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[-1].state == State.PIPELINE_STATE_SUCCEEDED
        assert [event.stage for event in events[1:]] == [1, 2, 3, 4, 6, 7, 7]


async def test_a_repeated_stage_does_nothing(sqlite: Database, driver: PipelineDriver, workers: PromptWorkers) -> None:
    name = sqlite.create()
    for _ in range(3):
        assert await driver.run_stage(name, 1, Stage.STAGE_VALIDATE) == CONTINUE
    assert workers.started == ["StartInspectRequest"]
    assert await driver.run_stage(name, 1, Stage.STAGE_BUILD_ENGINES) == CONTINUE  # none were asked for
    assert sqlite.sequences(name) == [1, 2]


async def test_an_attempt_that_lost_its_pipeline_ends(sqlite: Database, driver: PipelineDriver) -> None:
    name = sqlite.create()
    assert await driver.run_stage(name, 7, Stage.STAGE_VALIDATE) == SUPERSEDED
    assert await driver.run_stage("deleted", 1, Stage.STAGE_VALIDATE) == SUPERSEDED


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(FailedPreconditionError("no runtime"), CONTINUE), (InvalidArgumentError("bad target"), FAILED)],
)
async def test_only_a_missing_runtime_is_borne(
    sqlite: Database, driver: PipelineDriver, workers: PromptWorkers, error: GranqError, outcome: str
) -> None:
    made = spec()
    made.engines.add(runtime=common_pb2.RUNTIME_TENSORRT)
    name = sqlite.repository.create(made, "", ME)[0].pipeline_id
    workers.refusals["StartBuildEngineRequest"] = error
    assert await driver.run_stage(name, 1, Stage.STAGE_BUILD_ENGINES) == outcome
    pipeline = sqlite.repository.get(name).pipeline
    assert (pipeline.state in ENDED) == (outcome == FAILED)
    assert len(pipeline.results.engines) == (outcome == CONTINUE)
    assert sqlite.repository.open_jobs(name) == []


async def test_a_pipeline_whose_time_is_up_fails_and_a_retry_has_as_much_again(
    sqlite: Database, driver: PipelineDriver, workers: PromptWorkers
) -> None:
    made = spec()
    made.max_duration.FromSeconds(1)
    name = sqlite.repository.create(made, "", ME)[0].pipeline_id
    assert await driver.run_stage(name, 1, Stage.STAGE_VALIDATE) == CONTINUE
    workers.hangs = True
    assert await driver.run_stage(name, 1, Stage.STAGE_SYNTHESIZE) == FAILED
    pipeline = sqlite.repository.get(name).pipeline
    assert pipeline.end_time.ToMilliseconds() - pipeline.create_time.ToMilliseconds() >= 1000
    assert (pipeline.failure.code, pipeline.failure.reason) == (4, "PIPELINE_DEADLINE")
    assert pipeline.failure.field == "spec.max_duration"
    assert [call for call in workers.cancelled if call.startswith(f"{name}-synthesize")]
    workers.hangs = False
    attempt = sqlite.transitions.retry(name, ME)
    assert await driver.run_stage(name, attempt, Stage.STAGE_SYNTHESIZE) == CONTINUE


async def test_a_pool_has_no_more_jobs_than_allowed_and_they_go_by_priority(
    sqlite: Database, store: ArtifactStore, workers: PromptWorkers, threads: Threads
) -> None:
    driver = PipelineDriver(
        repository=sqlite.repository,
        transitions=sqlite.transitions,
        calls=DatabaseCalls(threads),
        jobs=_jobs(sqlite, workers, threads, quantizer=1),
        build_report=partial(build_report, store),
        report_threads=threads,
    )
    names = {}
    for priority in (0, -3, 9, 4):
        made = spec()
        made.priority = priority
        names[priority] = sqlite.repository.create(made, "", ME)[0].pipeline_id
    workers.hangs = True
    running = [asyncio.create_task(driver.run_stage(name, 1, Stage.STAGE_VALIDATE)) for name in names.values()]
    pool = driver._jobs._pools["quantizer"]
    async with asyncio.timeout(10):
        while len(pool._waiting) < len(names) - 1 or not workers.keys:
            await asyncio.sleep(0.01)
    assert len(workers.keys) == 1
    first = workers.keys[0].pipeline_id
    workers.hangs = False
    workers.resume.set()
    await asyncio.gather(*running)
    order = [key.pipeline_id for key in workers.keys]
    assert order[1:] == [names[priority] for priority in (9, 4, 0, -3) if names[priority] != first]
    assert {key.pipeline_id: key.priority for key in workers.keys} == {name: p for p, name in names.items()}


async def test_a_defect_fails_the_pipeline_without_telling_its_text(
    sqlite: Database, driver: PipelineDriver, workers: PromptWorkers
) -> None:
    wrong = jobs_pb2.JobResult(evaluation=reports_pb2.EvaluationResult())
    workers._results["StartInspectRequest"] = wrong
    name = sqlite.create()
    assert await driver.run_stage(name, 1, Stage.STAGE_VALIDATE) == FAILED
    failure = sqlite.repository.get(name).pipeline.failure
    assert (failure.code, failure.reason) == (13, "INTERNAL")
    assert "evaluation" not in failure.message


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, CONTINUE),
        (FailedPreconditionError("no GPU", reason="ENGINE_FOREIGN"), CONTINUE),
        (InternalError("cuStreamSynchronize: 700"), CONTINUE),
        (DataLossError("damaged"), FAILED),
    ],
)
async def test_engines_are_measured_where_they_run(
    sqlite: Database, driver: PipelineDriver, workers: PromptWorkers, error: GranqError | None, outcome: str
) -> None:
    made = spec()
    made.engines.add(runtime=common_pb2.RUNTIME_TENSORRT_RTX, name="rtx-ada")
    name = sqlite.repository.create(made, "", ME)[0].pipeline_id
    workers._results["StartEvaluateRequest"].evaluation.measurements.add(form=reports_pb2.MEASURED_FORM_ENGINE)
    for stage in (Stage.STAGE_EXPORT, Stage.STAGE_BUILD_ENGINES):
        assert await driver.run_stage(name, 1, stage) == CONTINUE
    workers.engine_refusal = error
    assert await driver.run_stage(name, 1, Stage.STAGE_EVALUATE) == outcome
    assert sqlite.repository.open_jobs(name) == []
    if outcome == FAILED:
        return
    found = sqlite.repository.get(name).pipeline.results.evaluation
    engines = [row.target for row in found.measurements if row.target]
    assert engines == ([] if error else ["rtx-ada"])
    assert [(e.target, e.failure.reason) for e in found.unmeasured] == ([("rtx-ada", error.reason)] if error else [])


async def test_each_target_gets_its_engine_its_reason_or_the_graph(
    sqlite: Database, driver: PipelineDriver, workers: PromptWorkers, store: ArtifactStore
) -> None:
    made = spec()
    made.engines.add(runtime=common_pb2.RUNTIME_ONNXRUNTIME, name="cpu")
    made.engines.add(runtime=common_pb2.RUNTIME_TENSORRT_RTX, name="rtx-ada")
    name = sqlite.repository.create(made, "", ME)[0].pipeline_id
    for stage in (Stage.STAGE_EXPORT, Stage.STAGE_BUILD_ENGINES):
        assert await driver.run_stage(name, 1, stage) == CONTINUE
    found = sqlite.repository.get(name).pipeline.results
    assert [outcome.WhichOneof("outcome") for outcome in found.engines] == ["graph", "engine"]
    assert found.engines[0].graph == found.export.onnx_ort
    assert [outcome.target.name for outcome in found.engines] == ["cpu", "rtx-ada"]
    assert workers.started.count("StartBuildEngineRequest") == 1
