"""GeneratorService."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from granq.v1 import generator_pb2, generator_pb2_grpc
from services.common.errors import InvalidArgumentError
from services.common.jobs import JobManager
from services.generator.sessions import JointSession, JointSessions

KINDS = {"synthesize": "services.generator.jobs:synthesize"}


class GeneratorServicer(generator_pb2_grpc.GeneratorServiceServicer):
    """Starts synthesis jobs, and carries the messages of joint trainings to and from their processes."""

    def __init__(self, jobs: JobManager, sessions: JointSessions) -> None:
        self._jobs = jobs
        self._sessions = sessions

    async def StartSynthesize(  # noqa: N802 - the generated base class names it
        self, request: generator_pb2.StartSynthesizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generator_pb2.StartSynthesizeResponse:
        """Start, attach to or resume a "synthesize" job."""
        return generator_pb2.StartSynthesizeResponse(job=await self._jobs.start("synthesize", request.key, request))

    async def CoTrain(  # noqa: N802
        self,
        request_iterator: AsyncIterator[generator_pb2.CoTrainRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Any]:
        """Train a generator together with the caller's student; responses stay serialized, as they came."""
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.HasField("open"):
            raise InvalidArgumentError("the first message of the stream must be open", field="open")
        async with self._sessions.open(first.open) as session:
            inward = asyncio.create_task(_pass_on(request_iterator, session))
            try:
                while (response := await _receive(session, inward)) is not None:
                    yield response
            finally:
                inward.cancel()
                with suppress(asyncio.CancelledError):
                    await inward


async def _pass_on(requests: AsyncIterator[generator_pb2.CoTrainRequest], session: JointSession) -> None:
    async for request in requests:
        await session.send(request)
    await session.end()


async def _receive(session: JointSession, inward: asyncio.Task[None]) -> bytes | None:
    """Return the process's next message, or raise what went wrong on the way in, such as an invalid request."""
    outward = asyncio.create_task(session.receive())
    try:
        waiting = {outward, inward} if not inward.done() else {outward}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if inward.done():
            inward.result()
        return await outward
    finally:
        outward.cancel()
