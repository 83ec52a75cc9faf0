"""Who may call what, how much, and what is written down of it; through a real server and a real channel."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from granq.v1 import artifacts_pb2, artifacts_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from services.common.errors import InvalidArgumentError
from services.common.logs import configure_logging
from services.common.principal import current_principal
from services.common.rpc import GrpcServer, status_to_error
from services.common.settings import MIB, ServerSettings
from tests.support.certificates import TOKENS, bearer, credential, people
from tests.support.identity_provider import AUDIENCE, ISSUER, identity_provider
from tests.support.rpc_servicers import DIGEST, AsyncArtifacts, CallerJobs, PlainArtifacts
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(60)
ALICE, BOB, ROOT = (bearer(TOKENS[name]) for name in ("alice", "bob", "root"))
READER_TOKEN = "granq_reader-0123456789"
READER = bearer(READER_TOKEN)
Serve = Callable[..., Awaitable[grpc.aio.Channel]]


class Artifacts(AsyncArtifacts):
    """Notes what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    async def GetArtifact(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.callers.append(current_principal().name)
        return await super().GetArtifact(request, context)

    async def UploadArtifact(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        self.callers.append(current_principal().name)
        return await super().UploadArtifact(request_iterator, context)


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def make(servicer: Any, people_file: str = people(), **settings: Any) -> grpc.aio.Channel:
            if people_file:
                settings["principals_file"] = tmp_path / "principals.toml"
                settings["principals_file"].write_text(people_file)
            server = GrpcServer("test", ServerSettings(port=0, log_format="json", **settings))
            server.add(artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server, servicer)
            server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, CallerJobs())
            await server.start()
            stack.push_async_callback(server.stop, 0)
            return await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}"))

        yield make


def stub(channel: grpc.aio.Channel) -> "artifacts_pb2_grpc.ArtifactServiceAsyncStub":
    made: artifacts_pb2_grpc.ArtifactServiceAsyncStub = artifacts_pb2_grpc.ArtifactServiceStub(channel)
    return made


def get(channel: grpc.aio.Channel, metadata: Any = ()) -> Any:
    return stub(channel).GetArtifact(artifacts_pb2.GetArtifactRequest(digest=DIGEST), metadata=metadata, timeout=20)


def messages(chunks: int = 1) -> Iterator[artifacts_pb2.UploadArtifactRequest]:
    yield artifacts_pb2.UploadArtifactRequest(header=artifacts_pb2.UploadHeader(name="x"))
    for _ in range(chunks):
        yield artifacts_pb2.UploadArtifactRequest(chunk=b"ab")


async def refused(call: Any, code: grpc.StatusCode) -> str:
    """Assert how a call ends, and return the reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value
    return status_to_error(caught.value).reason


async def test_a_token_lets_in_and_says_who_calls(serve: Serve) -> None:
    servicer = Artifacts()
    channel = await serve(servicer)
    for metadata in (ALICE, BOB, ROOT):
        await get(channel, metadata)
    await stub(channel).UploadArtifact(messages(), metadata=ALICE, timeout=20)
    assert servicer.callers == ["alice", "bob", "root", "alice"]


async def test_handlers_in_threads_know_who_calls(serve: Serve) -> None:
    callers = []

    class Plain(PlainArtifacts):
        def GetArtifact(self, request: Any, context: Any) -> Any:  # noqa: N802
            callers.append(current_principal().name)
            return super().GetArtifact(request, context)

        def DownloadArtifact(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
            for message in super().DownloadArtifact(request, context):
                callers.append(current_principal().name)
                yield message

    channel = await serve(Plain())
    await get(channel, ALICE)
    request = artifacts_pb2.DownloadArtifactRequest(digest=DIGEST)
    assert len([m async for m in stub(channel).DownloadArtifact(request, metadata=BOB)]) == 2
    assert callers == ["alice", "bob", "bob"]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "CREDENTIALS_MISSING"),
        ((("authorization", "Basic YWxpY2U6eA=="),), "CREDENTIALS_INVALID"),
        (bearer("granq_wrong"), "CREDENTIALS_INVALID"),
        (bearer(""), "CREDENTIALS_INVALID"),
        (bearer("x" * 6145), "CREDENTIALS_INVALID"),
        (ALICE + BOB, "CREDENTIALS_INVALID"),
    ],
    ids=["none", "basic", "wrong", "empty", "long", "two"],
)
async def test_without_a_known_token_nothing_is_called_or_read(serve: Serve, metadata: Any, reason: str) -> None:
    servicer = Artifacts()
    channel = await serve(servicer)
    assert await refused(get(channel, metadata), grpc.StatusCode.UNAUTHENTICATED) == reason
    # Not even looked at: an invalid request would be told as such.
    invalid = artifacts_pb2.GetArtifactRequest(digest="x")
    call = stub(channel).GetArtifact(invalid, metadata=metadata, timeout=20)
    assert await refused(call, grpc.StatusCode.UNAUTHENTICATED) == reason
    upload = stub(channel).UploadArtifact(messages(), metadata=metadata, timeout=20)
    assert await refused(upload, grpc.StatusCode.UNAUTHENTICATED) == reason
    download = stub(channel).DownloadArtifact(artifacts_pb2.DownloadArtifactRequest(digest=DIGEST), metadata=metadata)
    assert await refused(download.read(), grpc.StatusCode.UNAUTHENTICATED) == reason
    assert servicer.callers == []


async def test_scopes(serve: Serve) -> None:
    servicer = Artifacts()
    channel = await serve(servicer, people() + credential("reader", ["read"], READER_TOKEN))
    await get(channel, READER)
    with pytest.raises(grpc.aio.AioRpcError, match="UploadArtifact needs the scope 'submit'") as caught:
        await stub(channel).UploadArtifact(messages(), metadata=READER, timeout=20)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert status_to_error(caught.value).reason == "SCOPE_MISSING"
    assert servicer.callers == ["reader"]
    jobs: Any = jobs_pb2_grpc.JobServiceStub(channel)
    request = jobs_pb2.CancelJobRequest(job_id="j1")
    assert await refused(jobs.CancelJob(request, metadata=ALICE), grpc.StatusCode.PERMISSION_DENIED) == "SCOPE_MISSING"
    await jobs.CancelJob(request, metadata=ROOT)


async def test_tokens_are_revoked_without_a_restart(serve: Serve, tmp_path: Path) -> None:
    channel = await serve(Artifacts())
    await get(channel, ALICE)
    (tmp_path / "principals.toml").write_text(credential("bob", ["read"], TOKENS["bob"]))
    assert await refused(get(channel, ALICE), grpc.StatusCode.UNAUTHENTICATED) == "CREDENTIALS_INVALID"
    await get(channel, BOB)


async def test_tokens_of_an_identity_provider_beside_those_of_the_file(serve: Serve) -> None:
    servicer = Artifacts()
    with identity_provider() as provider:
        settings = {"oidc_issuer": ISSUER, "oidc_audience": AUDIENCE, "oidc_jwks_url": provider.url}
        channel = await serve(servicer, **settings)
        token = bearer(provider.token())
        for metadata in (token, ALICE, token):
            await get(channel, metadata)
        assert servicer.callers == ["oidc:carol", "alice", "oidc:carol"]
        upload = stub(channel).UploadArtifact(messages(), metadata=token, timeout=20)
        assert await refused(upload, grpc.StatusCode.PERMISSION_DENIED) == "SCOPE_MISSING"
        late = bearer(provider.token(exp=1))
        assert await refused(get(channel, late), grpc.StatusCode.UNAUTHENTICATED) == "CREDENTIALS_EXPIRED"


async def test_probes_need_no_token_and_reflection_does(serve: Serve) -> None:
    channel = await serve(Artifacts())
    health: Any = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert await refused(watch.read(), grpc.StatusCode.UNAUTHENTICATED) == "CREDENTIALS_MISSING"
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = [reflection_pb2.ServerReflectionRequest(list_services="")]
    listing = reflection.ServerReflectionInfo(iter(question), timeout=20)
    assert await refused(listing.read(), grpc.StatusCode.UNAUTHENTICATED) == "CREDENTIALS_MISSING"
    answers = reflection.ServerReflectionInfo(iter(question), metadata=ALICE, timeout=20)
    assert (await answers.read()).list_services_response.service


async def test_bytes_that_are_no_request(serve: Serve) -> None:
    channel = await serve(Artifacts())
    for method in ("GetArtifact", "DownloadArtifact", "UploadArtifact"):
        call: Any = channel.stream_stream(f"/granq.v1.ArtifactService/{method}", None, None)
        answer = call(iter([b"\xff\xff\xff"]), metadata=ALICE, timeout=20).read()
        assert await refused(answer, grpc.StatusCode.INVALID_ARGUMENT) == "INVALID_ARGUMENT"
        if method != "UploadArtifact":
            empty = call(iter([]), metadata=ALICE, timeout=20).read()
            assert await refused(empty, grpc.StatusCode.INVALID_ARGUMENT) == "INVALID_ARGUMENT"


async def test_large_messages_and_long_streams_end_with_resource_exhausted(serve: Serve) -> None:
    channel = await serve(Artifacts(), max_message_bytes=4 * MIB, max_stream_messages=3)
    large = artifacts_pb2.GetArtifactRequest(digest=DIGEST + "x" * 5 * MIB)
    call = stub(channel).GetArtifact(large, metadata=ALICE, timeout=20)
    assert await refused(call, grpc.StatusCode.RESOURCE_EXHAUSTED) == "RESOURCE_EXHAUSTED"
    await stub(channel).UploadArtifact(messages(2), metadata=ALICE, timeout=20)
    upload = stub(channel).UploadArtifact(messages(3), metadata=ALICE, timeout=20)
    assert await refused(upload, grpc.StatusCode.RESOURCE_EXHAUSTED) == "STREAM_TOO_LONG"


async def test_one_principals_calls_are_limited_and_anothers_go_on(serve: Serve) -> None:
    servicer = Artifacts()
    servicer.hang = True
    channel = await serve(servicer, max_principal_rpcs=2)
    hanging = [get(channel, ALICE) for _ in range(2)]
    await eventually(lambda: len(servicer.callers) == 2)
    assert await refused(get(channel, ALICE), grpc.StatusCode.RESOURCE_EXHAUSTED) == "TOO_MANY_CALLS"
    servicer.hang = False
    await get(channel, BOB)
    for call in hanging:
        call.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)

    async def outcome() -> grpc.StatusCode:
        call = get(channel, ALICE)
        await asyncio.gather(call, return_exceptions=True)
        code: grpc.StatusCode = await call.code()
        return code

    # The server learns of the cancellations in its own time.
    async with asyncio.timeout(15):
        while (code := await outcome()) is not grpc.StatusCode.OK:
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_of_all_together_are_limited_and_probes_still_answered(serve: Serve) -> None:
    servicer = Artifacts()
    servicer.hang = True
    channel = await serve(servicer, people_file="", max_concurrent_rpcs=2)
    hanging = [get(channel) for _ in range(2)]
    await eventually(lambda: len(servicer.callers) == 2)
    assert await refused(get(channel), grpc.StatusCode.RESOURCE_EXHAUSTED) == "TOO_MANY_CALLS"
    health: Any = health_pb2_grpc.HealthStub(channel)
    await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    for call in hanging:
        call.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)


async def test_who_calls_too_often_is_refused(serve: Serve) -> None:
    channel = await serve(Artifacts(), principal_rpc_burst=3, principal_rpcs_per_second=0.01)
    for _ in range(3):
        await get(channel, ALICE)
    assert await refused(get(channel, ALICE), grpc.StatusCode.RESOURCE_EXHAUSTED) == "RATE_LIMIT_EXCEEDED"
    await get(channel, BOB)


async def test_what_changes_something_is_audited_once_and_without_secrets(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "ERROR")
    servicer = Artifacts()
    channel = await serve(servicer)
    await get(channel, ALICE)
    await stub(channel).UploadArtifact(messages(3), metadata=ALICE, timeout=20)
    upload = stub(channel).UploadArtifact(messages(), metadata=bearer("granq_wrong-token"), timeout=20)
    await refused(upload, grpc.StatusCode.UNAUTHENTICATED)
    jobs: Any = jobs_pb2_grpc.JobServiceStub(channel)
    await refused(
        jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id="j1"), metadata=BOB), grpc.StatusCode.PERMISSION_DENIED
    )
    await jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id="j1"), metadata=ROOT)
    servicer.error = InvalidArgumentError("no")
    await refused(
        stub(channel).UploadArtifact(messages(), metadata=ALICE, timeout=20), grpc.StatusCode.INVALID_ARGUMENT
    )
    written = io.StringIO()

    def lines() -> list[dict[str, Any]]:
        written.write(capsys.readouterr().err)
        records = [json.loads(line) for line in written.getvalue().splitlines() if line.startswith("{")]
        return [record for record in records if record["event"] == "audit"]

    await eventually(lambda: len(lines()) == 5)
    seen = {(r["principal"], r["method"].rpartition("/")[2], r["target"], r["outcome"]) for r in lines()}
    assert seen == {
        ("alice", "UploadArtifact", DIGEST, "OK"),
        ("", "UploadArtifact", "", "UNAUTHENTICATED"),
        ("bob", "CancelJob", "", "PERMISSION_DENIED"),
        ("root", "CancelJob", "j1", "OK"),
        ("alice", "UploadArtifact", "", "INVALID_ARGUMENT"),
    }
    assert all(record["peer"] and record["request_id"] for record in lines())
    assert not any(token in written.getvalue() for token in (*TOKENS.values(), "granq_wrong-token", "Bearer"))


async def test_errors_call_files_of_the_server_by_their_names(serve: Serve, tmp_path: Path) -> None:
    servicer = Artifacts()
    servicer.error = InvalidArgumentError(f"cannot read '{tmp_path}/store/model.pt' nor /usr/lib/x.so", field="f")
    channel = await serve(servicer)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await get(channel, ALICE)
    assert caught.value.details() == "cannot read '…/model.pt' nor …/x.so"
    assert str(tmp_path) not in str(caught.value.trailing_metadata())
