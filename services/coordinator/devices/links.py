"""How the coordinator reaches a device: at the address that it named, or over the stream that it opened."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from google.protobuf.message import Message

from granq.v1 import devices_pb2, evaluator_pb2, jobs_pb2
from services.common.errors import InternalError, UnavailableError, from_failure

_STARTS: dict[type[Message], str] = {
    evaluator_pb2.StartBuildEngineRequest: "build_engine",
    evaluator_pb2.StartEvaluateRequest: "evaluate",
}


class DeviceLink(Protocol):
    """Calls of one device's evaluator. They raise the error that it told, or UnavailableError."""

    async def start(self, request: Message) -> jobs_pb2.Job:
        """Send a Start… request and return the job."""

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now."""

    def watch(self, job_id: str, run_id: str, sequence: int) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        """Yield a job's events behind a number of a run."""

    async def cancel(self, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask a job to end and return it as it is then."""

    async def close(self) -> None:
        """End the connection."""


class StreamLink:
    """A device behind the stream that it has opened.

    Args:
        device_id: The device.
        instance_id: Its process.
        timeout_seconds: Longest wait for the answer to a short call.
        watch_timeout_seconds: Longest time of one watch.
    """

    def __init__(self, device_id: str, instance_id: str, timeout_seconds: float, watch_timeout_seconds: float) -> None:
        self.device_id = device_id
        self.instance_id = instance_id
        self._timeout = timeout_seconds
        self._watch_timeout = watch_timeout_seconds
        self._numbers = itertools.count(1)
        self._outgoing: asyncio.Queue[devices_pb2.ServeJobsResponse | None] = asyncio.Queue()
        self._calls: dict[int, asyncio.Queue[devices_pb2.ServeJobsRequest | None]] = {}
        self._open = True

    async def outgoing(self) -> AsyncIterator[devices_pb2.ServeJobsResponse]:
        """Yield what is to be sent to the device, until the link is closed."""
        yield devices_pb2.ServeJobsResponse(welcome=devices_pb2.ServeJobsWelcome())
        while (message := await self._outgoing.get()) is not None:
            yield message

    def take(self, message: devices_pb2.ServeJobsRequest) -> None:
        """Take what the device sent; answers to calls that nobody waits for any longer are dropped."""
        waiting = self._calls.get(message.call_id)
        if waiting is not None:
            waiting.put_nowait(message)

    async def close(self) -> None:
        """End the stream and all calls."""
        self._open = False
        self._outgoing.put_nowait(None)
        for waiting in self._calls.values():
            waiting.put_nowait(None)

    async def start(self, request: Message) -> jobs_pb2.Job:
        """Send a Start… request and return the job."""
        return await self._job(self._timeout, **{_STARTS[type(request)]: request})

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now."""
        return await self._job(self._timeout, get_job=jobs_pb2.GetJobRequest(job_id=job_id))

    async def cancel(self, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask a job to end and return it as it is then."""
        request = jobs_pb2.CancelJobRequest(job_id=job_id)
        return await self._job(min(timeout_seconds, self._timeout), cancel_job=request)

    async def watch(self, job_id: str, run_id: str, sequence: int) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        """Yield a job's events behind a number of a run; ends with the job, or before it when the time is up."""
        request = jobs_pb2.WatchJobRequest(job_id=job_id, run_id=run_id, after_sequence=sequence)
        number, answers = self._send(watch_job=request)
        deadline = asyncio.get_running_loop().time() + self._watch_timeout
        ended = False
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        answer = self._checked(await answers.get())
                except TimeoutError:
                    return  # a long job; the caller looks at it and watches on
                ended = answer.WhichOneof("payload") == "watch_end"
                if ended:
                    return
                yield answer.event
        finally:
            self._end(number, drop=not ended)

    async def _job(self, seconds: float, **payload: Any) -> jobs_pb2.Job:
        number, answers = self._send(**payload)
        answered = False
        try:
            async with asyncio.timeout(seconds):
                answer = self._checked(await answers.get())
            answered = True
        except TimeoutError as error:
            raise UnavailableError(
                f"device {self.device_id} did not answer for {seconds:.0f} s", reason="WORKER_UNAVAILABLE"
            ) from error
        finally:
            self._end(number, drop=not answered)
        if answer.WhichOneof("payload") != "job":
            raise InternalError(f"device {self.device_id} answered a call with {answer.WhichOneof('payload')}")
        return answer.job

    def _send(self, **payload: Any) -> tuple[int, "asyncio.Queue[devices_pb2.ServeJobsRequest | None]"]:
        if not self._open:
            raise self._gone()
        number = next(self._numbers)
        answers: asyncio.Queue[devices_pb2.ServeJobsRequest | None] = asyncio.Queue()
        self._calls[number] = answers
        self._outgoing.put_nowait(devices_pb2.ServeJobsResponse(call_id=number, **payload))
        return number, answers

    def _end(self, number: int, *, drop: bool) -> None:
        del self._calls[number]
        if drop and self._open:
            self._outgoing.put_nowait(devices_pb2.ServeJobsResponse(call_id=number, drop=devices_pb2.DropCall()))

    def _checked(self, answer: devices_pb2.ServeJobsRequest | None) -> devices_pb2.ServeJobsRequest:
        if answer is None:
            raise self._gone()
        if answer.WhichOneof("payload") == "failure":
            raise from_failure(answer.failure)
        return answer

    def _gone(self) -> UnavailableError:
        return UnavailableError(f"the stream of device {self.device_id} is closed", reason="WORKER_UNAVAILABLE")
