"""Pipelines and artifacts belong to whoever made them: others are told that there are none."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from granq.v1 import artifacts_pb2, coordinator_pb2
from services.coordinator.grants import digests_of
from tests.support.certificates import TOKENS, bearer, people
from tests.support.coordinator import PATIENCE, Bench, bench
from tests.support.pipelines import spec

pytestmark = pytest.mark.timeout(120)
ALICE, BOB, ROOT = (bearer(TOKENS[name]) for name in ("alice", "bob", "root"))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Bench]:
    principals = tmp_path / "principals.toml"
    principals.write_text(people())
    async with bench(tmp_path, principals_file=principals) as made:
        yield made


def stubs(made: Bench) -> tuple[Any, Any]:
    assert made.client is not None
    return made.client.pipelines, made.client.artifacts


async def upload(made: Bench, content: bytes, who: Any) -> artifacts_pb2.Artifact:
    _, artifacts = stubs(made)
    messages = [
        artifacts_pb2.UploadArtifactRequest(header=artifacts_pb2.UploadHeader(name="m")),
        artifacts_pb2.UploadArtifactRequest(chunk=content),
    ]
    answer = await artifacts.UploadArtifact(iter(messages), metadata=who, timeout=PATIENCE)
    artifact: artifacts_pb2.Artifact = answer.artifact
    return artifact


async def submit(made: Bench, who: Any, request_id: str = "") -> coordinator_pb2.Pipeline:
    pipelines, _ = stubs(made)
    request = coordinator_pb2.SubmitPipelineRequest(spec=spec(await upload(made, b"model", who)), request_id=request_id)
    pipeline: coordinator_pb2.Pipeline = (
        await pipelines.SubmitPipeline(request, metadata=who, timeout=PATIENCE)
    ).pipeline
    return pipeline


async def finished(made: Bench, pipeline_id: str, who: Any) -> coordinator_pb2.Pipeline:
    pipelines, _ = stubs(made)
    request = coordinator_pb2.WatchPipelineRequest(pipeline_id=pipeline_id)
    async for _event in pipelines.WatchPipeline(request, metadata=who, timeout=PATIENCE):
        pass
    asked = coordinator_pb2.GetPipelineRequest(pipeline_id=pipeline_id)
    pipeline: coordinator_pb2.Pipeline = (await pipelines.GetPipeline(asked, metadata=who, timeout=PATIENCE)).pipeline
    return pipeline


async def told(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def listed(made: Bench, who: Any, **fields: Any) -> list[str]:
    pipelines, _ = stubs(made)
    found: list[str] = []
    token = ""
    while True:
        request = coordinator_pb2.ListPipelinesRequest(page_size=1, page_token=token, **fields)
        page = await pipelines.ListPipelines(request, metadata=who, timeout=PATIENCE)
        found += [pipeline.pipeline_id for pipeline in page.pipelines]
        token = page.next_page_token
        if not token:
            return found


async def test_others_are_told_what_they_would_be_told_of_nothing(served: Bench) -> None:
    pipelines, artifacts = stubs(served)
    mine = (await submit(served, ALICE)).pipeline_id
    done = await finished(served, mine, ALICE)
    assert done.state == coordinator_pb2.PIPELINE_STATE_SUCCEEDED, done.failure
    made = sorted(set(digests_of(done.results)))
    assert done.results.bundle.digest in made

    def calls(pipeline_id: str, who: Any) -> list[Any]:
        options = {"metadata": who, "timeout": PATIENCE}
        watch = coordinator_pb2.WatchPipelineRequest(pipeline_id=pipeline_id)
        return [
            pipelines.GetPipeline(coordinator_pb2.GetPipelineRequest(pipeline_id=pipeline_id), **options),
            pipelines.WatchPipeline(watch, **options).read(),
            pipelines.CancelPipeline(coordinator_pb2.CancelPipelineRequest(pipeline_id=pipeline_id), **options),
            pipelines.RetryPipeline(coordinator_pb2.RetryPipelineRequest(pipeline_id=pipeline_id), **options),
            pipelines.DeletePipeline(coordinator_pb2.DeletePipelineRequest(pipeline_id=pipeline_id), **options),
        ]

    for foreign, absent in zip(calls(mine, BOB), calls("p-absent", BOB), strict=True):
        code, details = await told(foreign)
        assert code is grpc.StatusCode.NOT_FOUND
        assert (code, details.replace(mine, "p-absent")) == await told(absent)
    for digest in (*made, done.spec.model.artifact.digest):
        absent = "sha256:" + hashlib.sha256(digest.encode()).hexdigest()
        for name, request in (
            ("GetArtifact", artifacts_pb2.GetArtifactRequest),
            ("DownloadArtifact", artifacts_pb2.DownloadArtifactRequest),
        ):

            def ask(wanted: str, name: str = name, request: Any = request) -> Any:
                call = getattr(artifacts, name)(request(digest=wanted), metadata=BOB, timeout=PATIENCE)
                return call.read() if name == "DownloadArtifact" else call

            code, details = await told(ask(digest))
            assert code is grpc.StatusCode.NOT_FOUND
            assert (code, details.replace(digest, absent)) == await told(ask(absent))
    # The owner and the administrator see all of it.
    for who in (ALICE, ROOT):
        for digest in made:
            await artifacts.GetArtifact(artifacts_pb2.GetArtifactRequest(digest=digest), metadata=who, timeout=PATIENCE)
        assert (await finished(served, mine, who)).pipeline_id == mine


async def test_lists_show_ones_own(served: Bench) -> None:
    of_alice = [(await submit(served, ALICE)).pipeline_id for _ in range(2)]
    of_bob = [(await submit(served, BOB)).pipeline_id for _ in range(2)]
    assert await listed(served, ALICE) == of_alice[::-1]
    assert await listed(served, BOB) == of_bob[::-1]
    assert await listed(served, ROOT) == (of_alice + of_bob)[::-1]


async def test_a_model_of_somebody_else_cannot_be_used(served: Bench) -> None:
    pipelines, _ = stubs(served)
    secret = await upload(served, b"secret weights", ALICE)
    request = coordinator_pb2.SubmitPipelineRequest(spec=spec(secret))
    code, details = await told(pipelines.SubmitPipeline(request, metadata=BOB, timeout=PATIENCE))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, f"the store does not hold {secret.digest}")
    # Who has the content may use it: the store then keeps it once, for both.
    assert (await upload(served, b"secret weights", BOB)).digest == secret.digest
    await pipelines.SubmitPipeline(request, metadata=BOB, timeout=PATIENCE)


async def test_request_ids_are_each_owners_own(served: Bench) -> None:
    of_alice = await submit(served, ALICE, "nightly")
    of_bob = await submit(served, BOB, "nightly")
    assert of_alice.pipeline_id != of_bob.pipeline_id
    assert (await submit(served, ALICE, "nightly")).pipeline_id == of_alice.pipeline_id


async def test_owners_steer_their_pipelines_and_administrators_everybodys(served: Bench) -> None:
    pipelines, artifacts = stubs(served)
    mine, other = [(await submit(served, who)).pipeline_id for who in (ALICE, BOB)]
    done = await finished(served, mine, ALICE)
    await finished(served, other, BOB)
    for pipeline_id, who in ((mine, ALICE), (other, ROOT)):
        request = coordinator_pb2.DeletePipelineRequest(pipeline_id=pipeline_id)
        await pipelines.DeletePipeline(request, metadata=who, timeout=PATIENCE)
    assert await listed(served, ROOT) == []
    # What a pipeline made goes with it; what was uploaded stays its uploader's.
    bundle = artifacts_pb2.GetArtifactRequest(digest=done.results.bundle.digest)
    code, _ = await told(artifacts.GetArtifact(bundle, metadata=ALICE, timeout=PATIENCE))
    assert code is grpc.StatusCode.NOT_FOUND
    model = artifacts_pb2.GetArtifactRequest(digest=done.spec.model.artifact.digest)
    await artifacts.GetArtifact(model, metadata=ALICE, timeout=PATIENCE)


async def test_pipelines_from_before_there_were_owners_are_for_administrators(served: Bench, tmp_path: Path) -> None:
    await served.stop_coordinator()
    client = await served.start_coordinator(principals_file=None)
    anonymous = (await client.submit()).pipeline_id
    await client.finish(anonymous)
    await served.stop_coordinator()
    await served.start_coordinator()
    assert await listed(served, ROOT) == [anonymous]
    assert await listed(served, ALICE) == []
