"""Answers the coordinator's calls that come over the stream which this device has opened."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from google.protobuf.message import Message

from granq.v1 import devices_pb2, jobs_pb2
from services.common.errors import InvalidArgumentError, as_granq_error, to_failure
from services.common.jobs import JobManager
from services.common.logs import get_logger
from services.common.rpc.validation import validate
from services.evaluator.starting import JobStarter

Send = Callable[[devices_pb2.ServeJobsRequest], None]

log = get_logger(__name__)


class CallServing:
    """The calls of EvaluatorService and JobService that a coordinator needs, as messages.

    Args:
        starter: Starts jobs.
        jobs: Holds them.
    """

    def __init__(self, starter: JobStarter, jobs: JobManager) -> None:
        self._starter = starter
        self._jobs = jobs

    async def serve(self, calls: AsyncIterator[devices_pb2.ServeJobsResponse], send: Send) -> None:
        """Answer calls until there are no more; jobs that they started go on."""
        tasks: dict[int, asyncio.Task[None]] = {}
        try:
            async for call in calls:
                kind = call.WhichOneof("payload")
                if kind == "drop":
                    dropped = tasks.pop(call.call_id, None)
                    if dropped is not None:
                        dropped.cancel()
                elif kind != "welcome":
                    tasks = {number: task for number, task in tasks.items() if not task.done()}
                    tasks[call.call_id] = asyncio.create_task(self._answer(call, kind or "", send))
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _answer(self, call: devices_pb2.ServeJobsResponse, kind: str, send: Send) -> None:
        def reply(**payload: Any) -> None:
            send(devices_pb2.ServeJobsRequest(call_id=call.call_id, **payload))

        try:
            request: Message | None = getattr(call, kind) if kind else None
            validate(request)
            match request:
                case jobs_pb2.WatchJobRequest():
                    events = self._jobs.watch(request.job_id, request.after_sequence, request.run_id)
                    async with aclosing(events):  # type: ignore[type-var]
                        async for event in events:
                            reply(event=event)
                    reply(watch_end=devices_pb2.WatchEnd())
                case _:
                    reply(job=await self._job(call, kind))
        except Exception as error:
            if as_granq_error(error) is None:
                log.exception("a call of the coordinator failed by a defect", call=kind)
            reply(failure=to_failure(error))

    async def _job(self, call: devices_pb2.ServeJobsResponse, kind: str) -> jobs_pb2.Job:
        match kind:
            case "build_engine":
                return await self._starter.build_engine(call.build_engine)
            case "evaluate":
                return await self._starter.evaluate(call.evaluate)
            case "get_job":
                return await self._jobs.get(call.get_job.job_id)
            case "cancel_job":
                return await self._jobs.cancel(call.cancel_job.job_id)
            case _:
                # A newer coordinator may have calls that this evaluator does not know.
                raise InvalidArgumentError("this evaluator does not know the call; update it", reason="CALL_UNKNOWN")
