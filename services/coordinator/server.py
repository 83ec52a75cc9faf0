"""Assembly of the coordinator: database, workflow engine, workers and servicers in one server."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from granq.v1 import artifacts_pb2_grpc, coordinator_pb2_grpc, devices_pb2_grpc, evaluator_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.rpc import GrpcServer
from services.common.rpc.worker_client import WorkerClient
from services.common.rpc.worker_replicas import WorkerReplicas
from services.common.slots import Place
from services.coordinator.bundle import build_report
from services.coordinator.calls import DatabaseCalls
from services.coordinator.database import database_engine, parse_url, prepare_database
from services.coordinator.devices.membership import Membership
from services.coordinator.devices.metrics import DeviceCollector
from services.coordinator.devices.pool import DevicePool
from services.coordinator.devices.reach import ConfiguredEvaluator, PlacedJobs
from services.coordinator.devices.servicer import DeviceServicer
from services.coordinator.devices.table import DeviceTable, Terms
from services.coordinator.driver import PipelineDriver
from services.coordinator.engine import WorkflowEngine
from services.coordinator.grants import Grants
from services.coordinator.hub import EventHub
from services.coordinator.locks import ExecutorLocks
from services.coordinator.manager import PipelineManager
from services.coordinator.metrics import PipelineCollector
from services.coordinator.ownership import OwnArtifacts, OwnPipelines
from services.coordinator.pipeline_jobs import PipelineJobs
from services.coordinator.references import References
from services.coordinator.repository import Repository
from services.coordinator.requests import STAGES, JobCall
from services.coordinator.retention import Retention, RetentionPolicy
from services.coordinator.runner import Patience
from services.coordinator.servicer import ArtifactServicer, PipelineServicer
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.statistics import read_statistics
from services.coordinator.sweeper import Sweeper
from services.coordinator.threads import Threads
from services.coordinator.transfer import ArtifactTransfer
from services.coordinator.transitions import Transitions

_DATABASE_THREADS = 8
_STORE_THREADS = 8


class GrpcWorkers:
    """The workers, reached by gRPC at the configured addresses."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        addresses = {
            "generator": settings.generator_address,
            "quantizer": settings.quantizer_address,
            "evaluator": settings.evaluator_address,
        }
        self._clients = {
            name: WorkerReplicas(address, partial(self._connect, settings, name, address))
            for name, address in addresses.items()
        }
        self._evaluator = self._connect(settings, "evaluator", settings.evaluator_address, settings.evaluator_address)

    def _connect(self, settings: CoordinatorSettings, name: str, configured: str, address: str) -> WorkerClient:
        return WorkerClient(
            name,
            address,
            settings,
            max_message_bytes=settings.max_message_bytes,
            timeout_seconds=settings.rpc_timeout_seconds,
            watch_timeout_seconds=settings.watch_timeout_seconds,
            # Certificates name the service, and not the pod that it means.
            server_name="" if address == configured else configured.rpartition(":")[0],
        )

    async def capabilities(self) -> evaluator_pb2.GetCapabilitiesResponse:
        """Return what the evaluator can run and build."""
        return await self._evaluator.capabilities()

    async def start(self, call: JobCall) -> jobs_pb2.Job:
        """Start a job, attach to the one that runs, or resume one that failed."""
        return await self._clients[call.worker].start(call.request)

    async def get(self, worker: str, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now."""
        return await self._clients[worker].get(job_id)

    def watch(
        self, worker: str, job_id: str, run_id: str, sequence: int
    ) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        """Yield a job's events behind a number of a run."""
        return self._clients[worker].watch(job_id, run_id, sequence)

    async def cancel(self, worker: str, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask a job to end."""
        return await self._clients[worker].cancel(job_id, timeout_seconds)

    async def close(self) -> None:
        """Close all connections."""
        await self._evaluator.close()
        for client in self._clients.values():
            await client.close()


def _pool(settings: CoordinatorSettings, table: DeviceTable, calls: DatabaseCalls, workers: GrpcWorkers) -> DevicePool:
    def dial(device_id: str, address: str) -> WorkerClient:
        return WorkerClient(
            f"device {device_id}",
            address,
            settings,
            max_message_bytes=settings.max_message_bytes,
            timeout_seconds=settings.rpc_timeout_seconds,
            watch_timeout_seconds=settings.watch_timeout_seconds,
        )

    return DevicePool(
        table=table,
        calls=calls,
        evaluator=ConfiguredEvaluator(workers),
        dial=dial,
        patience_seconds=settings.device_patience_seconds,
        poll_seconds=settings.device_poll_seconds,
    )


class CoordinatorServer(GrpcServer):
    """The coordinator's server. At most one may run in a process: the workflow engine is a singleton.

    Args:
        settings: The coordinator's settings.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        super().__init__("coordinator", settings)
        self._configured = settings
        url = parse_url(settings.database_url)
        self._engine = database_engine(url)
        self._locks = ExecutorLocks(url)
        self._threads = Threads(_DATABASE_THREADS, "database")
        self._store_threads = Threads(_STORE_THREADS, "artifacts")
        self._workers = GrpcWorkers(settings)
        self._repository = Repository(self._engine)
        calls = DatabaseCalls(self._threads)
        self._hub = EventHub(self._repository, calls)
        self._transitions = Transitions(self._engine, self._hub.changed)
        store = ArtifactStore.of(settings)
        table = DeviceTable(self._engine, Terms(settings.device_heartbeat_seconds, settings.device_lease_seconds))
        self._pool = _pool(settings, table, calls, self._workers)
        self._membership = Membership(
            table=table,
            calls=calls,
            pool=self._pool,
            timeout_seconds=settings.rpc_timeout_seconds,
            watch_timeout_seconds=settings.watch_timeout_seconds,
        )
        running = PlacedJobs(self._pool, self._workers)
        jobs = PipelineJobs(
            repository=self._repository,
            transitions=self._transitions,
            calls=calls,
            places=self._pool,
            running=running,
            patience=Patience(settings.unavailable_seconds, settings.max_crashes),
            pools={
                "generator": settings.max_generator_jobs,
                "quantizer": settings.max_quantizer_jobs,
                "evaluator": settings.max_evaluator_jobs,
            },
        )
        driver = PipelineDriver(
            repository=self._repository,
            transitions=self._transitions,
            calls=calls,
            jobs=jobs,
            build_report=partial(build_report, store),
            report_threads=self._store_threads,
        )

        async def place_of(pipeline_id: str) -> Place:
            return await calls.insist(self._repository.place, pipeline_id)

        self._workflows = WorkflowEngine(
            url=url,
            executor_id=settings.executor_id,
            application_version=settings.application_version,
            steps=STAGES,
            run_step=driver.run_stage,
            max_running=settings.max_running_pipelines,
            place_of=place_of,
        )
        self._manager = PipelineManager(
            repository=self._repository,
            transitions=self._transitions,
            hub=self._hub,
            calls=calls,
            engine=self._workflows,
            jobs=running,
            store=store,
            executor_id=settings.executor_id,
            cancel_seconds=settings.cancel_seconds,
            deleted=lambda: self._retention.soon(),
        )
        self._retention = Retention(
            references=References(self._engine),
            store=store,
            threads=Threads(1, "retention"),
            locks=self._locks,
            delete=self._manager.delete,
            policy=RetentionPolicy(
                grace=settings.artifact_grace_seconds,
                uploads=settings.upload_seconds,
                jobs=settings.job_record_seconds,
                pipelines=settings.retention_seconds,
                interval=settings.tidy_seconds,
            ),
        )
        transfer = ArtifactTransfer(store, self._store_threads, settings.max_artifact_bytes)
        artifacts = OwnArtifacts(transfer, Grants(self._engine), calls)
        pipelines = OwnPipelines(self._manager, self._repository, calls, artifacts)
        self.add(coordinator_pb2_grpc.add_PipelineServiceServicer_to_server, PipelineServicer(pipelines))
        self.add(devices_pb2_grpc.add_DeviceServiceServicer_to_server, DeviceServicer(self._membership))
        self.add(artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server, ArtifactServicer(artifacts))
        self.manage(self._resources_in_order())

    @asynccontextmanager
    async def _resources_in_order(self) -> AsyncIterator[None]:
        settings = self._configured
        async with AsyncExitStack() as stack:
            stack.callback(self._engine.dispose)
            stack.callback(self._store_threads.close)
            stack.callback(self._threads.close)
            stack.push_async_callback(self._workers.close)
            await self._threads.call(prepare_database, self._engine)
            # Before anything is recovered: two processes with one executor id would run each workflow twice.
            lock = await self._threads.call(self._locks.hold, settings.executor_id, settings.lock_seconds)
            stack.enter_context(lock)
            stack.push_async_callback(self._hub.close)
            await self._pool.start()
            stack.push_async_callback(self._membership.close)
            stack.push_async_callback(self._workflows.close)
            self._workflows.launch()
            stack.push_async_callback(self._manager.close)
            sweeper = Sweeper(
                repository=self._repository,
                transitions=self._transitions,
                threads=self._threads,
                engine=self._workflows,
                locks=self._locks,
                held=lock,
                executor_id=settings.executor_id,
                application_version=settings.application_version,
                finish_cancel=self._manager.finish_cancel,
                end_stray_jobs=self._manager.end_stray_jobs,
                interval_seconds=settings.sweep_seconds,
            )
            stack.push_async_callback(sweeper.close)
            await sweeper.start()
            stack.push_async_callback(self._retention.close)
            self._retention.start()
            collector = PipelineCollector(partial(read_statistics, self._engine))
            collector.register()
            stack.callback(collector.unregister)
            devices = DeviceCollector(self._pool.counts)
            devices.register()
            stack.callback(devices.unregister)
            yield

    async def stop(self, grace: float | None = None) -> None:
        """End watches and streams, which would use up the grace, then all else; pipelines go on at the next start."""
        await self._hub.close()
        await self._membership.close()
        await super().stop(grace)


def create_server(settings: CoordinatorSettings) -> CoordinatorServer:
    """Assemble a coordinator; call it on the event loop that is to serve."""
    return CoordinatorServer(settings)
