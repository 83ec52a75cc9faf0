"""Submits pipelines under faults, follows them, and carries those that failed to their end."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

import granq
from granq.v1 import coordinator_pb2
from tests.support.chaos.rig import Deployment

State = coordinator_pb2.PipelineState
_T = TypeVar("_T")
# What a client of a service that is being broken has to expect, and to repeat.
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)

_AFTER_FAILURE_SECONDS = 5.0


@dataclass
class Driven:
    """One pipeline of a run.

    Attributes:
        spec: Number of its spec.
        pipeline: As it ended under faults.
        retried: As it ended after a retry, once nothing was broken any more; None where that was not needed.
        interruptions: Events that announced a repeated attempt.
    """

    spec: int
    pipeline: coordinator_pb2.Pipeline
    retried: coordinator_pb2.Pipeline | None = None
    interruptions: int = 0


def insist(call: Callable[[], _T], deadline: float) -> _T:
    """Return what a call returns, repeating it while the service is away."""
    while True:
        try:
            return call()
        except granq.GranqClientError as error:
            if error.code not in _PASSING or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def follow(client: granq.Client, pipeline_id: str, deadline: float) -> tuple[coordinator_pb2.Pipeline, int]:
    """Watch a pipeline to its end; return it, and how many repeated attempts its events announced."""
    last = interruptions = 0

    def watch() -> None:
        nonlocal last, interruptions
        for event in client.watch(pipeline_id, after_sequence=last, timeout=deadline - time.monotonic()):
            assert event.sequence == last + 1, f"{pipeline_id}: {event.sequence} after {last}"
            last = event.sequence
            interruptions += event.HasField("failure") and event.state == State.PIPELINE_STATE_RUNNING

    insist(watch, deadline)
    return insist(lambda: client.get(pipeline_id), deadline), interruptions


def drive(deployment: Deployment, count: int, at_once: int, prefix: str, seconds: float) -> list[Driven]:
    """Run pipelines, some at a time, and return them as they ended."""
    deadline = time.monotonic() + seconds
    numbers, lock = iter(range(count)), threading.Lock()
    driven: dict[int, Driven] = {}
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            with deployment.client(worker) as client:
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None or errors:
                        return
                    spec = number % len(deployment.specs)
                    submit = lambda: client.submit(deployment.specs[spec], request_id=f"{prefix}-{number}")  # noqa: B023, E731
                    pipeline, interruptions = follow(client, insist(submit, deadline).pipeline_id, deadline)
                    driven[number] = Driven(spec, pipeline, None, interruptions)
                    if pipeline.state == State.PIPELINE_STATE_FAILED:
                        # As somebody who looks why first: else all pipelines meet their end on the same full disk.
                        time.sleep(_AFTER_FAILURE_SECONDS)
        except BaseException as error:  # told in the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline + 60 - time.monotonic()))
    if errors:
        raise errors[0]
    assert len(driven) == count, f"{len(driven)} of {count} pipelines ended within {seconds:.0f} s"
    return [driven[number] for number in range(count)]


def retry_failed(deployment: Deployment, driven: list[Driven], seconds: float) -> None:
    """Continue the pipelines that failed, now that nothing is broken."""
    deadline = time.monotonic() + seconds
    with deployment.client() as client:
        for each in driven:
            if each.pipeline.state == State.PIPELINE_STATE_FAILED:
                insist(lambda: client.retry(each.pipeline.pipeline_id), deadline)  # noqa: B023
                each.retried, _ = follow(client, each.pipeline.pipeline_id, deadline)
