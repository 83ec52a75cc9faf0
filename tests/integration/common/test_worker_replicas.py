"""Several real workers behind one name: a job stays where it is, new ones are spread, lost ones begin elsewhere."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from granq.v1 import artifacts_pb2, common_pb2, generator_pb2, jobs_pb2
from services.common.errors import NotFoundError, ResourceExhaustedError, UnavailableError
from services.common.rpc import GrpcServer, worker_replicas
from services.common.rpc.worker_client import WorkerClient
from services.common.rpc.worker_replicas import WorkerReplicas, resolve
from services.common.settings import ServerSettings
from tests.support.job_server import create_server


def request(job_id: str, pipeline_id: str = "p1") -> generator_pb2.StartSynthesizeRequest:
    return generator_pb2.StartSynthesizeRequest(
        key=jobs_pb2.JobKey(job_id=job_id, pipeline_id=pipeline_id),
        model=common_pb2.ModelSource(
            artifact=artifacts_pb2.Artifact(digest="sha256:" + "0" * 64), architecture="until_cancelled"
        ),
    )


def connect(name: str, address: str) -> WorkerClient:
    return WorkerClient(
        name, address, ServerSettings(), max_message_bytes=2**22, timeout_seconds=20, watch_timeout_seconds=60
    )


class Cluster:
    """Two servers, and the name that means those of them that are listed."""

    def __init__(self, servers: list[GrpcServer]) -> None:
        self.servers = servers
        self.listed = [f"127.0.0.1:{server.port}" for server in servers]

    async def resolve(self, address: str) -> list[str]:
        assert address == "worker:1"
        return self.listed

    def replicas(self) -> WorkerReplicas:
        return WorkerReplicas("worker:1", partial(connect, "worker"), self.resolve)

    async def jobs_at(self, number: int) -> set[str]:
        server = self.servers[number]
        assert server._jobs is not None
        return {job.key.job_id for job in server._jobs.list()}


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(worker_replicas, "_RESOLVE_SECONDS", 0.0)
    settings = {"port": 0, "metrics_port": 0, "artifact_url": tmp_path.as_uri(), "max_running_jobs": 4}
    servers = [create_server(ServerSettings.model_validate(settings)) for _ in range(2)]
    for server in servers:
        await server.start()
    yield Cluster(servers)
    for server in servers:
        await server.stop(0)


async def test_new_jobs_are_spread_and_stay_where_they_are(cluster: Cluster) -> None:
    replicas = cluster.replicas()
    for job_id in ("a", "b", "c", "d"):
        await replicas.start(request(job_id))
    places = [await cluster.jobs_at(0), await cluster.jobs_at(1)]
    assert sorted(map(len, places)) == [2, 2]
    assert not places[0] & places[1]
    await replicas.start(request("a"))  # attaches
    assert [await cluster.jobs_at(0), await cluster.jobs_at(1)] == places
    for job_id in ("a", "b", "c", "d"):
        assert (await replicas.get(job_id)).key.job_id == job_id
        assert (await replicas.cancel(job_id, 5)).key.job_id == job_id
    await replicas.close()


async def test_a_coordinator_that_was_restarted_finds_each_job_again(cluster: Cluster) -> None:
    before = cluster.replicas()
    for job_id in ("a", "b"):
        await before.start(request(job_id))
    await before.close()
    places = [await cluster.jobs_at(0), await cluster.jobs_at(1)]
    after = cluster.replicas()
    watched = [event async for event in cut(after, "a")]
    assert watched[0].job.key.job_id == "a"
    assert (await after.start(request("b"))).key.job_id == "b"
    assert [await cluster.jobs_at(0), await cluster.jobs_at(1)] == places
    with pytest.raises(NotFoundError, match="'c'"):
        await after.get("c")
    await after.close()


async def cut(replicas: WorkerReplicas, job_id: str) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
    """Yield a running job's first event."""
    events = replicas.watch(job_id, "", 0)
    async for event in events:
        yield event
        break
    await events.aclose()


async def test_a_server_that_is_gone_is_replaced_and_one_that_is_silent_is_waited_for(cluster: Cluster) -> None:
    replicas = cluster.replicas()
    await replicas.start(request("a"))
    owner = 0 if "a" in await cluster.jobs_at(0) else 1
    await cluster.servers[owner].stop(0)
    with pytest.raises(UnavailableError):  # it is still listed, and may come back with the job
        await replicas.start(request("a"))
    cluster.listed = [cluster.listed[1 - owner]]
    await replicas.start(request("a"))
    assert await cluster.jobs_at(1 - owner) == {"a"}
    await replicas.close()


async def test_a_busy_server_is_passed_over(cluster: Cluster) -> None:
    for server in cluster.servers:
        assert server._jobs is not None
        server._jobs._settings = server.settings.model_copy(update={"single_pipeline": True})
    replicas = cluster.replicas()
    await replicas.start(request("a"))
    await replicas.start(request("b", "p2"))
    places = [await cluster.jobs_at(0), await cluster.jobs_at(1)]
    assert sorted(map(len, places)) == [1, 1]
    # Both are equally busy, and one of them is this pipeline's.
    for job_id, pipeline_id, other in (("c", "p1", "a"), ("d", "p2", "b")):
        await replicas.start(request(job_id, pipeline_id))
        assert {job_id, other} in [await cluster.jobs_at(0), await cluster.jobs_at(1)]
    with pytest.raises(ResourceExhaustedError, match="another pipeline") as refused:
        await replicas.start(request("e", "p3"))
    assert refused.value.reason == "WORKER_BUSY"
    await replicas.close()


async def test_a_name_of_one_address_stays_a_name() -> None:
    assert await resolve("127.0.0.1:50052") == ["127.0.0.1:50052"]
    assert await resolve("localhost:50052") == ["localhost:50052"]
    assert await resolve("no-such-host.invalid:1") == ["no-such-host.invalid:1"]
