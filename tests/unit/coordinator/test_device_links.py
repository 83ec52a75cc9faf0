"""Calls over a device's stream."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from granq.v1 import common_pb2, devices_pb2, evaluator_pb2, jobs_pb2
from services.common.errors import FailedPreconditionError, InternalError, UnavailableError
from services.coordinator.devices.links import StreamLink

Answer = devices_pb2.ServeJobsRequest


class Device:
    """The other end of a link."""

    def __init__(self, timeout: float = 5.0, watch_timeout: float = 5.0) -> None:
        self.link = StreamLink("nano", "a" * 32, timeout, watch_timeout)
        self._calls = self.link.outgoing()

    async def next(self) -> devices_pb2.ServeJobsResponse:
        async with asyncio.timeout(5):
            return await anext(self._calls)

    def __aiter__(self) -> AsyncIterator[devices_pb2.ServeJobsResponse]:
        return self._calls


async def connected(timeout: float = 5.0, watch_timeout: float = 5.0) -> Device:
    device = Device(timeout, watch_timeout)
    assert (await device.next()).WhichOneof("payload") == "welcome"
    return device


async def test_answers_find_their_calls_in_any_order() -> None:
    device = await connected()
    request = evaluator_pb2.StartBuildEngineRequest(key=jobs_pb2.JobKey(job_id="one"))
    build = asyncio.create_task(device.link.start(request))
    look = asyncio.create_task(device.link.get("two"))
    first, second = await device.next(), await device.next()
    assert (first.build_engine, second.get_job.job_id) == (request, "two")
    device.link.take(Answer(call_id=999, job=jobs_pb2.Job(run_id="of nobody's call")))
    device.link.take(Answer(call_id=second.call_id, job=jobs_pb2.Job(run_id="second")))
    device.link.take(Answer(call_id=first.call_id, job=jobs_pb2.Job(run_id="first")))
    assert ((await build).run_id, (await look).run_id) == ("first", "second")


async def test_failures_are_raised_as_the_device_told_them() -> None:
    device = await connected()
    start = asyncio.create_task(device.link.start(evaluator_pb2.StartEvaluateRequest()))
    call = await device.next()
    assert call.WhichOneof("payload") == "evaluate"
    failure = common_pb2.Failure(code=9, reason="ENGINE_FOREIGN", message="not here", field="engine")
    device.link.take(Answer(call_id=call.call_id, failure=failure))
    with pytest.raises(FailedPreconditionError, match="not here") as caught:
        await start
    assert (caught.value.reason, caught.value.field) == ("ENGINE_FOREIGN", "engine")


async def test_an_answer_of_another_kind_is_a_defect() -> None:
    device = await connected()
    look = asyncio.create_task(device.link.get("job"))
    call = await device.next()
    device.link.take(Answer(call_id=call.call_id, watch_end=devices_pb2.WatchEnd()))
    with pytest.raises(InternalError, match="watch_end"):
        await look


async def test_a_watch_goes_on_until_its_end() -> None:
    device = await connected()
    watching = asyncio.create_task(anext(events := device.link.watch("job", "run", 7)))
    call = await device.next()
    assert (call.watch_job.job_id, call.watch_job.run_id, call.watch_job.after_sequence) == ("job", "run", 7)
    for number in (8, 9):
        device.link.take(Answer(call_id=call.call_id, event=jobs_pb2.WatchJobResponse(sequence=number)))
    device.link.take(Answer(call_id=call.call_id, watch_end=devices_pb2.WatchEnd()))
    assert [(await watching).sequence, *[event.sequence async for event in events]] == [8, 9]


async def test_a_watch_that_is_left_is_dropped_at_the_device() -> None:
    device = await connected()
    watching = asyncio.create_task(anext(events := device.link.watch("job", "", 0)))
    call = await device.next()
    device.link.take(Answer(call_id=call.call_id, event=jobs_pb2.WatchJobResponse(sequence=1)))
    await watching
    await events.aclose()
    dropped = await device.next()
    assert (dropped.call_id, dropped.WhichOneof("payload")) == (call.call_id, "drop")


async def test_a_long_watch_ends_when_its_time_is_up() -> None:
    device = await connected(watch_timeout=0.05)
    assert [event async for event in device.link.watch("job", "", 0)] == []


async def test_a_silent_device_is_unavailable() -> None:
    device = await connected(timeout=0.05)
    with pytest.raises(UnavailableError, match="nano did not answer"):
        await device.link.cancel("job", 60)
    call, dropped = await device.next(), await device.next()
    assert call.cancel_job.job_id == "job"
    assert dropped.WhichOneof("payload") == "drop"


async def test_the_end_of_the_stream_ends_all_calls_and_those_that_follow() -> None:
    device = await connected()
    look = asyncio.create_task(device.link.get("job"))
    watching = asyncio.create_task(anext(device.link.watch("job", "", 0)))
    await device.next()
    await device.next()
    await device.link.close()
    assert [call async for call in device] == []
    for call in (look, watching, asyncio.create_task(device.link.get("job"))):
        with pytest.raises(UnavailableError, match="nano is closed"):
            await call
