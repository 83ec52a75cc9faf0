"""Follows a pipeline's events through broken connections and restarted coordinators."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from granq.channel import Backoff
from granq.errors import GranqClientError, from_rpc_error
from granq.v1 import coordinator_pb2, coordinator_pb2_grpc

FINAL_STATES = frozenset(
    (
        coordinator_pb2.PIPELINE_STATE_SUCCEEDED,
        coordinator_pb2.PIPELINE_STATE_FAILED,
        coordinator_pb2.PIPELINE_STATE_CANCELLED,
    )
)
# A server that stops ends its streams with either of the two.
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@dataclass
class Watch:
    """One endless-seeming stream of events, made of as many calls as it takes.

    Attributes:
        stub: Stub of the pipeline service.
        pipeline_id: The pipeline.
        last: Number of the last event seen; events up to it are never returned again.
        call_timeout: Deadline in seconds of a unary call.
        patience: Seconds without a working connection after which the error is raised.
        deadline: Value of ``time.monotonic()`` at which to give up altogether; None for never.
    """

    stub: coordinator_pb2_grpc.PipelineServiceStub
    pipeline_id: str
    last: int
    call_timeout: float
    patience: float
    deadline: float | None = None

    def events(self) -> Iterator[coordinator_pb2.WatchPipelineResponse]:
        """Yield the events after ``last``, each once and in order, until the pipeline has ended.

        Raises:
            GranqClientError: UNAVAILABLE when the server stays away for ``patience`` seconds, DEADLINE_EXCEEDED at
                ``deadline``, DATA_LOSS when the server skips an event, or what the server answered.
        """
        backoff, broken_since = Backoff(), None
        while True:
            before = self.last
            try:
                yield from self._one_call()
                if self._ended():
                    return
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                if failure.code not in _BROKEN:
                    raise failure from error
            else:
                failure = GranqClientError(grpc.StatusCode.UNAVAILABLE, "the server keeps ending the stream early")
            now = time.monotonic()
            if self.last > before or broken_since is None:
                broken_since = now
                backoff.reset()
            if now - broken_since > self.patience:
                raise failure
            time.sleep(min(backoff.next(), self._remaining()))

    def _one_call(self) -> Iterator[coordinator_pb2.WatchPipelineResponse]:
        request = coordinator_pb2.WatchPipelineRequest(pipeline_id=self.pipeline_id, after_sequence=self.last)
        timeout = None if self.deadline is None else self._remaining()
        call = self.stub.WatchPipeline(request, timeout=timeout)
        try:
            for event in call:
                if event.sequence <= self.last:
                    continue
                if event.sequence > self.last + 1:
                    text = f"event {self.last + 1} of pipeline {self.pipeline_id} is missing: {event.sequence} came"
                    raise GranqClientError(grpc.StatusCode.DATA_LOSS, text, reason="EVENT_GAP")
                self.last = event.sequence
                yield event
        finally:
            # No effect on a stream that has ended; frees one that the caller left early.
            call.cancel()

    def _ended(self) -> bool:
        """Tell a stream that is complete from one that a stopping server closed politely.

        The state in the last event is not enough: a retried pipeline goes on after a final state.
        """
        request = coordinator_pb2.GetPipelineRequest(pipeline_id=self.pipeline_id)
        timeout = min(self.call_timeout, self._remaining())
        pipeline = self.stub.GetPipeline(request, timeout=timeout).pipeline
        return pipeline.state in FINAL_STATES and pipeline.last_sequence <= self.last

    def _remaining(self) -> float:
        if self.deadline is None:
            return self.call_timeout
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            text = f"pipeline {self.pipeline_id} did not end in the time given; it goes on"
            raise GranqClientError(grpc.StatusCode.DEADLINE_EXCEEDED, text, reason="WAIT_TIMEOUT")
        return remaining
