"""What must hold after a chaos run, whatever was broken in it."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import psycopg
from google.protobuf.message import Message

import granq
from granq.v1 import artifacts_pb2, coordinator_pb2
from services.common.artifacts import ArtifactStore, local
from tests.support.chaos.rig import Deployment

UNAVAILABLE, RESOURCE_EXHAUSTED = (
    code.value[0] for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
)


def is_injected(pipeline: coordinator_pb2.Pipeline) -> bool:
    """Return whether a pipeline failed for something that the monkey does, and not by a defect."""
    failure = pipeline.failure
    return failure.code == UNAVAILABLE or (failure.code == RESOURCE_EXHAUSTED and failure.reason == "DISK_FULL")


def artifacts_of(message: Message) -> Iterator[artifacts_pb2.Artifact]:
    """Yield every artifact that a message names, at any depth."""
    if isinstance(message, artifacts_pb2.Artifact):
        if message.digest:
            yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        for item in value if isinstance(value, list) or hasattr(value, "add") else [value]:
            yield from artifacts_of(item)


def check_events(client: granq.Client, pipeline: coordinator_pb2.Pipeline) -> None:
    """Assert that the events are numbered without gap or repeat, as the server sends them."""
    request = coordinator_pb2.WatchPipelineRequest(pipeline_id=pipeline.pipeline_id)
    # Not the client's own `watch`, which would leave repeats out.
    numbers = [event.sequence for event in client._pipelines.WatchPipeline(request, timeout=60)]
    assert numbers == list(range(1, pipeline.last_sequence + 1)), f"{pipeline.pipeline_id}: {numbers}"


def check_artifacts(deployment: Deployment, pipeline: coordinator_pb2.Pipeline) -> int:
    """Assert that every artifact is whole and has the content of its digest; return how many there are."""
    store, count = ArtifactStore((deployment.folder / "artifacts").as_uri()), 0
    for artifact in artifacts_of(pipeline):
        store.verify(artifact.digest)
        assert store.stat(artifact.digest).size_bytes == artifact.size_bytes, artifact
        count += 1
    return count


def check_database(deployment: Deployment) -> None:
    """Assert that no workflow and no job is left of pipelines that have ended."""
    with psycopg.connect(deployment.database_url) as connection:
        live = connection.execute(
            "SELECT workflow_uuid, status FROM dbos.workflow_status WHERE status IN ('PENDING', 'ENQUEUED', 'DELAYED')"
        ).fetchall()
        assert not live, live
        jobs = connection.execute("SELECT pipeline_id, job_id FROM pipeline_jobs").fetchall()
        assert not jobs, jobs


def check_nothing_left(deployment: Deployment, scratch: Path) -> None:
    """Assert that the servers, which have ended, left no process, port or temporary file behind."""
    url = (deployment.folder / "artifacts").as_uri()
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("GRANQ_ARTIFACT_URL") == url and process.status() != psutil.STATUS_ZOMBIE:
                left.append((process.pid, process.cmdline()))
    assert not left, left
    for server in deployment.servers:
        for port in (server.server.port, server.server.metrics_port):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, f"{server.server.name} still listens on {port}"
    assert not list(scratch.iterdir()), list(scratch.iterdir())
    # What a killed process was writing goes when a store is opened a minute later. Only the minute is left out here.
    age, local._ABANDONED_SECONDS = local._ABANDONED_SECONDS, 0.0
    try:
        ArtifactStore(url)
    finally:
        local._ABANDONED_SECONDS = age
    staged = list((deployment.folder / "artifacts" / "tmp").iterdir())
    assert not staged, staged
