"""Errors, validation, metrics and cancellation through a real server and a real channel."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import REGISTRY

from granq.v1 import artifacts_pb2, artifacts_pb2_grpc, common_pb2, generator_pb2, generator_pb2_grpc
from services.common.errors import INTERNAL_MESSAGE, GranqError, NotFoundError
from services.common.logs import configure_logging
from services.common.rpc import GrpcServer, status_to_error
from services.common.rpc.status import DETAILS_KEY, STATUS_CODES
from services.common.settings import ServerSettings
from tests.support.rpc_servicers import DIGEST, AbortingArtifacts, AsyncArtifacts, ContextArtifacts, PlainArtifacts
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(60)
Serve = Callable[[Any], Awaitable["artifacts_pb2_grpc.ArtifactServiceAsyncStub"]]
STYLES = pytest.mark.parametrize("style", [AsyncArtifacts, ContextArtifacts, PlainArtifacts])
ERRORS = pytest.mark.parametrize("cls", list(STATUS_CODES), ids=lambda cls: cls.__name__)


@pytest.fixture
async def open_channel(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[grpc.aio.Channel]]]:
    async with AsyncExitStack() as stack:

        async def serve(register: Any, servicer: Any) -> grpc.aio.Channel:
            settings = ServerSettings(port=0, artifact_url=tmp_path.as_uri(), log_format="json", log_level="DEBUG")
            server = GrpcServer("test", settings)
            server.add(register, servicer)
            await server.start()
            stack.push_async_callback(server.stop, 0)
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
            return await stack.enter_async_context(channel)

        yield serve


@pytest.fixture
def serve(open_channel: Callable[..., Awaitable[grpc.aio.Channel]]) -> Serve:
    async def make(servicer: Any) -> Any:
        channel = await open_channel(artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server, servicer)
        return artifacts_pb2_grpc.ArtifactServiceStub(channel)

    return make


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    metadata: Any = error.trailing_metadata()
    (value,) = [value for key, value in metadata if key == DETAILS_KEY]
    status = status_pb2.Status.FromString(value)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RequestInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    assert found["ErrorInfo"].domain == "granq"
    return found


def get(digest: str = DIGEST) -> artifacts_pb2.GetArtifactRequest:
    return artifacts_pb2.GetArtifactRequest(digest=digest)


def download() -> artifacts_pb2.DownloadArtifactRequest:
    return artifacts_pb2.DownloadArtifactRequest(digest=DIGEST)


def upload(*chunks: bytes) -> Iterator[artifacts_pb2.UploadArtifactRequest]:
    header = artifacts_pb2.UploadArtifactRequest(header=artifacts_pb2.UploadHeader(name="x"))
    return iter([header, *(artifacts_pb2.UploadArtifactRequest(chunk=chunk) for chunk in chunks)])


TYPES = {"DownloadArtifact": "server_stream", "UploadArtifact": "client_stream", "CoTrain": "bidi_stream"}


def figure(name: str, method: str, **labels: str) -> float:
    service, _, name_of_method = method.rpartition("/")
    labels |= {
        "grpc_type": TYPES.get(name_of_method, "unary"),
        "grpc_service": f"granq.v1.{service}",
        "grpc_method": name_of_method,
    }
    return REGISTRY.get_sample_value(name, labels) or 0.0


def count(method: str, code: str) -> float:
    return figure("grpc_server_handled_total", method, grpc_code=code)


@STYLES
async def test_all_kinds_of_calls_work(serve: Serve, style: type) -> None:
    stub = await serve(style())
    assert (await stub.GetArtifact(get())).artifact.digest == DIGEST
    assert [message.chunk async for message in stub.DownloadArtifact(download())] == [b"1", b"2"]
    assert (await stub.UploadArtifact(upload(b"ab", b"c"))).artifact.size_bytes == 3


@STYLES
@ERRORS
async def test_every_error_reaches_the_caller(serve: Serve, style: type, cls: type[GranqError]) -> None:
    raised = cls("it is so", reason="TEST_REASON", field="spec.model")
    stub = await serve(style(raised))
    received = []

    async def stream() -> None:
        async for message in stub.DownloadArtifact(download()):
            received.append(message.chunk)  # noqa: PERF401

    for call in (lambda: stub.GetArtifact(get()), stream, lambda: stub.UploadArtifact(upload(b"a"))):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        assert caught.value.code() is STATUS_CODES[cls]
        assert caught.value.details() == "it is so"
        assert details(caught.value)["ErrorInfo"].reason == "TEST_REASON"
        told = status_to_error(caught.value)
        assert (type(told), told.message, told.reason, told.field) == (cls, "it is so", "TEST_REASON", "spec.model")
    assert received == [b"1"]


@STYLES
async def test_defect_is_told_with_a_fixed_text(serve: Serve, style: type, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    stub = await serve(style(KeyError("the secret")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetArtifact(get())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == INTERNAL_MESSAGE
    found = details(caught.value)
    assert "secret" not in str(caught.value.trailing_metadata())
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    (record,) = [record for record in records if "exception" in record]
    assert "the secret" in record["exception"]
    assert record["request_id"] == found["RequestInfo"].request_id


async def test_invalid_request_names_its_fields(serve: Serve) -> None:
    stub = await serve(AsyncArtifacts())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DownloadArtifact(artifacts_pb2.DownloadArtifactRequest(digest="x", offset=-1)).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("digest: ")
    violations = details(caught.value)["BadRequest"].field_violations
    assert [violation.field for violation in violations] == ["digest", "offset"]
    assert status_to_error(caught.value).field == "digest"


async def test_nested_and_repeated_fields_have_paths(open_channel: Callable[..., Awaitable[Any]]) -> None:
    class Servicer(generator_pb2_grpc.GeneratorServiceServicer):
        async def StartSynthesize(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise AssertionError("the request must not come through")

        def CoTrain(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
            raise AssertionError

    channel = await open_channel(generator_pb2_grpc.add_GeneratorServiceServicer_to_server, Servicer())
    request = generator_pb2.StartSynthesizeRequest(
        model=common_pb2.ModelSource(artifact=artifacts_pb2.Artifact(digest="x"), input_shape=[3, 0, 32])
    )
    request.key.job_id = "a"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generator_pb2_grpc.GeneratorServiceStub(channel).StartSynthesize(request)
    fields = {violation.field for violation in details(caught.value)["BadRequest"].field_violations}
    assert fields == {"model.artifact.digest", "model.input_shape[1]"}


@STYLES
@pytest.mark.parametrize("position", [0, 2])
async def test_each_message_of_a_stream_is_checked(serve: Serve, style: type, position: int) -> None:
    stub = await serve(style())
    messages = list(upload(b"a", b"b", b"c"))
    messages[position] = artifacts_pb2.UploadArtifactRequest()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.UploadArtifact(iter(messages))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status_to_error(caught.value).field == "payload"


async def test_bidirectional_stream(open_channel: Callable[..., Awaitable[Any]]) -> None:
    class Servicer(generator_pb2_grpc.GeneratorServiceServicer):
        async def CoTrain(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
            async for _ in request_iterator:
                yield generator_pb2.CoTrainResponse()
            raise NotFoundError("no more")

        def StartSynthesize(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise AssertionError

    channel = await open_channel(generator_pb2_grpc.add_GeneratorServiceServicer_to_server, Servicer())
    call = generator_pb2_grpc.GeneratorServiceStub(channel).CoTrain()
    save = generator_pb2.CoTrainRequest(save=generator_pb2.CoTrainSave())
    for _ in range(2):
        await call.write(save)
        assert await call.read() == generator_pb2.CoTrainResponse()
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError, match="no more"):
        await call.read()
    wrong = generator_pb2_grpc.GeneratorServiceStub(channel).CoTrain()
    await wrong.write(save)
    await wrong.read()
    await wrong.write(generator_pb2.CoTrainRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await wrong.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_handlers_own_end_is_kept_and_counted(serve: Serve) -> None:
    stub = await serve(AbortingArtifacts())
    aborted, ranged = count("ArtifactService/GetArtifact", "ABORTED"), "ArtifactService/DownloadArtifact"
    before = count(ranged, "OUT_OF_RANGE")
    with pytest.raises(grpc.aio.AioRpcError, match="by hand") as caught:
        await stub.GetArtifact(get())
    assert caught.value.code() is grpc.StatusCode.ABORTED
    with pytest.raises(grpc.aio.AioRpcError, match="set") as caught:
        assert [message async for message in stub.DownloadArtifact(download())]
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    await eventually(lambda: count("ArtifactService/GetArtifact", "ABORTED") == aborted + 1)
    await eventually(lambda: count(ranged, "OUT_OF_RANGE") == before + 1)


async def test_cancelled_and_late_calls_are_counted_as_such(serve: Serve) -> None:
    servicer = AsyncArtifacts()
    servicer.hang = True
    stub = await serve(servicer)
    unary, stream = "ArtifactService/GetArtifact", "ArtifactService/DownloadArtifact"
    before = {(m, c): count(m, c) for m in (unary, stream) for c in ("CANCELLED", "DEADLINE_EXCEEDED", "OK")}
    call = stub.GetArtifact(get())
    # Served in this same loop, so the handler runs while the test waits for it.
    await asyncio.wait_for(servicer.entered.wait(), 10)
    call.cancel()
    watch = stub.DownloadArtifact(download())
    await watch.read()
    assert figure("grpc_server_in_flight", stream) == 1
    watch.cancel()
    await asyncio.wait_for(servicer.left.wait(), 10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetArtifact(get(), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert status_to_error(caught.value).reason == "DEADLINE_EXCEEDED"
    await eventually(lambda: count(unary, "CANCELLED") == before[unary, "CANCELLED"] + 1)
    await eventually(lambda: count(stream, "CANCELLED") == before[stream, "CANCELLED"] + 1)
    await eventually(lambda: count(unary, "DEADLINE_EXCEEDED") == before[unary, "DEADLINE_EXCEEDED"] + 1)
    assert count(unary, "OK") == before[unary, "OK"]
    assert figure("grpc_server_in_flight", stream) == 0


@STYLES
async def test_messages_of_all_kinds_of_calls_are_counted(serve: Serve, style: type) -> None:
    stub = await serve(style())
    unary, download_, upload_ = (f"ArtifactService/{name}Artifact" for name in ("Get", "Download", "Upload"))
    names = ("started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count", "handled_total")

    def figures(method: str) -> list[float]:
        codes = {"handled_total": {"grpc_code": "OK"}}
        return [figure(f"grpc_server_{name}", method, **codes.get(name, {})) for name in names]

    def is_counted(method: str, expected: list[float]) -> bool:
        return figures(method) == expected

    before = {method: figures(method) for method in (unary, download_, upload_)}
    await stub.GetArtifact(get())
    assert len([message async for message in stub.DownloadArtifact(download())]) == 2
    await stub.UploadArtifact(upload(b"ab", b"c", b"d"))
    for method, received, sent in ((unary, 1, 1), (download_, 1, 2), (upload_, 4, 1)):
        expected = [old + new for old, new in zip(before[method], (1, received, sent, 1, 1), strict=True)]
        await eventually(partial(is_counted, method, expected))


async def test_a_refused_call_counts_its_messages_and_no_response(serve: Serve) -> None:
    stub = await serve(PlainArtifacts(NotFoundError("gone")))
    method = "ArtifactService/UploadArtifact"
    sent, received = figure("grpc_server_msg_sent_total", method), figure("grpc_server_msg_received_total", method)
    ended = count(method, "NOT_FOUND")
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.UploadArtifact(upload(b"a"))
    await eventually(lambda: count(method, "NOT_FOUND") == ended + 1)
    assert figure("grpc_server_msg_sent_total", method) == sent
    assert figure("grpc_server_msg_received_total", method) - received <= 2


async def test_unknown_method_is_counted_without_its_name(open_channel: Callable[..., Awaitable[Any]]) -> None:
    labels = {"grpc_type": "unary", "grpc_service": "unknown", "grpc_method": "unknown", "grpc_code": "UNIMPLEMENTED"}
    before = REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0
    channel = await open_channel(artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server, AsyncArtifacts())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/made.Up/Name")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert REGISTRY.get_sample_value("grpc_server_handled_total", labels) == before + 1


async def test_nobody_listens() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await artifacts_pb2_grpc.ArtifactServiceStub(channel).GetArtifact(get())
    assert status_to_error(caught.value).reason == "UNAVAILABLE"
