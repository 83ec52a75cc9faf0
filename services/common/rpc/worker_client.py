"""Client of one worker (generator, quantizer or evaluator): starts jobs there and follows them."""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from granq.v1 import (
    evaluator_pb2,
    evaluator_pb2_grpc,
    generator_pb2,
    generator_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    quantizer_pb2,
    quantizer_pb2_grpc,
)
from services.common.errors import UnavailableError
from services.common.logs import get_logger
from services.common.rpc.connection import Connection
from services.common.rpc.status import status_to_error
from services.common.security import SecuritySettings
from services.common.tracing import outgoing

_log = get_logger("services.common.rpc")
_OPTIONS = (
    # A dead peer is noticed within half a minute, also while nothing is sent. Servers must permit this rate.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Callers retry by themselves; the channel must not wait minutes before it connects again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Its own connection: a broken one must not be shared with another client of this process.
    ("grpc.use_local_subchannel_pool", 1),
)
# Not the server's verdict on the call, but a connection that broke or was too slow.
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

_STARTS: dict[type[Message], Callable[[grpc.aio.Channel], Callable[..., Any]]] = {
    generator_pb2.StartSynthesizeRequest: lambda channel: (
        generator_pb2_grpc.GeneratorServiceStub(channel).StartSynthesize
    ),
    quantizer_pb2.StartInspectRequest: lambda channel: quantizer_pb2_grpc.QuantizerServiceStub(channel).StartInspect,
    quantizer_pb2.StartQuantizeRequest: lambda channel: quantizer_pb2_grpc.QuantizerServiceStub(channel).StartQuantize,
    quantizer_pb2.StartSimulateRequest: lambda channel: quantizer_pb2_grpc.QuantizerServiceStub(channel).StartSimulate,
    quantizer_pb2.StartExportRequest: lambda channel: quantizer_pb2_grpc.QuantizerServiceStub(channel).StartExport,
    evaluator_pb2.StartEvaluateRequest: lambda channel: evaluator_pb2_grpc.EvaluatorServiceStub(channel).StartEvaluate,
    evaluator_pb2.StartBuildEngineRequest: lambda channel: (
        evaluator_pb2_grpc.EvaluatorServiceStub(channel).StartBuildEngine
    ),
}


class WorkerClient:
    """Connection to one worker. Connects by itself, and again after the worker was away.

    Every call raises the `GranqError` that the worker answered with, and `UnavailableError` when it cannot be reached
    or is too slow.

    Args:
        name: What the worker is called in messages.
        address: Its host:port.
        security: What this service shows there.
        max_message_bytes: Largest message, received or sent.
        timeout_seconds: Deadline of short calls.
        watch_timeout_seconds: Deadline of one stream of events.
        server_name: Name in its certificate; by default, the host of the address.
    """

    def __init__(
        self,
        name: str,
        address: str,
        security: SecuritySettings,
        *,
        max_message_bytes: int,
        timeout_seconds: float,
        watch_timeout_seconds: float,
        server_name: str = "",
    ) -> None:
        self._name = name
        self._address = address
        self._timeout = timeout_seconds
        self._watch_timeout = watch_timeout_seconds
        named = [("grpc.ssl_target_name_override", server_name)] if server_name else []
        limits = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        )
        self._connection = Connection(address, security, [*_OPTIONS, *limits, *named], watch_timeout_seconds)

    @property
    def _jobs(self) -> "jobs_pb2_grpc.JobServiceAsyncStub":
        return jobs_pb2_grpc.JobServiceStub(self._connection.channel())

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return self._connection.metadata()

    async def start(self, request: Message) -> jobs_pb2.Job:
        """Send a Start… request and return the job."""
        call = _STARTS[type(request)](self._connection.channel())
        try:
            response = await call(request, timeout=self._timeout, metadata=(*self._metadata, *outgoing()))
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from error
        job: jobs_pb2.Job = response.job
        return job

    async def capabilities(self) -> evaluator_pb2.GetCapabilitiesResponse:
        """Return what an evaluator can run and build."""
        stub: evaluator_pb2_grpc.EvaluatorServiceAsyncStub = evaluator_pb2_grpc.EvaluatorServiceStub(
            self._connection.channel()
        )
        try:
            return await stub.GetCapabilities(
                evaluator_pb2.GetCapabilitiesRequest(), timeout=self._timeout, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from error

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now."""
        try:
            request = jobs_pb2.GetJobRequest(job_id=job_id)
            response = await self._jobs.GetJob(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from error
        return response.job

    async def active_jobs(self) -> int:
        """Return how many jobs wait or run there."""
        try:
            response = await self._jobs.ListJobs(
                jobs_pb2.ListJobsRequest(), timeout=self._timeout, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from error
        active = (jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING)
        return sum(job.state in active for job in response.jobs)

    async def watch(self, job_id: str, run_id: str, sequence: int) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        """Yield a job's events behind a number of a run; ends with the job, or before it when the time is up."""
        request = jobs_pb2.WatchJobRequest(job_id=job_id, after_sequence=sequence, run_id=run_id)
        call = self._jobs.WatchJob(request, timeout=self._watch_timeout, metadata=self._metadata)
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return  # a long job; the caller looks at it and watches on
            raise self._as_error(error) from error
        finally:
            call.cancel()

    async def cancel(self, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask a job to end and return it as it is then."""
        request = jobs_pb2.CancelJobRequest(job_id=job_id)
        try:
            timeout = min(timeout_seconds, self._timeout)
            response = await self._jobs.CancelJob(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._as_error(error) from error
        return response.job

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    def _as_error(self, error: grpc.aio.AioRpcError) -> Exception:
        if error.code() in _BROKEN:
            # Where it is stays in the log: users see this in their pipeline's events.
            _log.info(
                "no answer", worker=self._name, address=self._address, code=error.code().name, why=error.details()
            )
            return UnavailableError(f"the {self._name} does not answer", reason="WORKER_UNAVAILABLE")
        return status_to_error(error)
