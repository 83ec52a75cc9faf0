"""TLS and mutual TLS of real servers, certificates that change while they run, and what stays plain."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from granq.v1 import artifacts_pb2, artifacts_pb2_grpc, jobs_pb2, jobs_pb2_grpc
from services.common.errors import FailedPreconditionError, GranqError, UnauthenticatedError, UnavailableError
from services.common.rpc import GrpcServer
from services.common.rpc.worker_client import WorkerClient
from services.common.security import SecuritySettings
from services.common.settings import MIB, ServerSettings
from tests.support.certificates import Authority, bearer, credential
from tests.support.rpc_servicers import DIGEST, AsyncArtifacts, CallerJobs

pytestmark = pytest.mark.timeout(60)
Serve = Callable[..., Awaitable[GrpcServer]]
NEW = [("grpc.use_local_subchannel_pool", 1)]
SERVICE_TOKEN = "granq_service-0123456789"


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def make(**settings: Any) -> GrpcServer:
            server = GrpcServer("test", ServerSettings(port=0, **settings))
            server.add(artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server, AsyncArtifacts())
            server.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, CallerJobs())
            await server.start()
            stack.push_async_callback(server.stop, 0)
            return server

        yield make


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def tls(authority: Authority, *names: str) -> dict[str, Any]:
    certificate, key = authority.issue(*names)
    return {"tls_certificate": certificate, "tls_key": key}


async def get(
    server: GrpcServer, credentials: grpc.ChannelCredentials | None, *, host: str = "127.0.0.1", metadata: Any = ()
) -> str:
    """Call on a connection of its own; return the status."""
    address = f"{host}:{server.port}"
    channel = (
        grpc.aio.insecure_channel(address, options=NEW)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options=NEW)
    )
    async with channel:
        made: Any = artifacts_pb2_grpc.ArtifactServiceStub(channel)
        try:
            await made.GetArtifact(artifacts_pb2.GetArtifactRequest(digest=DIGEST), metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


def trusting(authority: Authority, files: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    if files is None:
        return grpc.ssl_channel_credentials(authority.pem)
    certificate, key = files
    return grpc.ssl_channel_credentials(authority.pem, key.read_bytes(), certificate.read_bytes())


async def test_tls_with_the_right_authority_only(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    server = await serve(**tls(authority))
    assert await get(server, trusting(authority)) == "OK"
    assert await get(server, trusting(authority), host="localhost") == "OK"
    assert await get(server, None) == "UNAVAILABLE"
    assert await get(server, trusting(Authority(tmp_path, "other"))) == "UNAVAILABLE"


async def test_a_certificate_for_another_host_is_not_accepted(serve: Serve, authority: Authority) -> None:
    server = await serve(**tls(authority, "example.org"))
    assert await get(server, trusting(authority)) == "UNAVAILABLE"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_old_versions_of_tls_are_refused(serve: Serve, authority: Authority) -> None:
    server = await serve(**tls(authority))

    def shake(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(authority.path))
        context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            return secure.version()

    assert await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_1)


async def test_a_new_certificate_is_used_without_a_restart(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    server = await serve(**tls(authority))
    successor = Authority(tmp_path, "successor")
    assert await get(server, trusting(successor)) == "UNAVAILABLE"
    successor.issue()  # over the files of before
    assert await get(server, trusting(successor)) == "OK"
    assert await get(server, trusting(authority)) == "UNAVAILABLE"


async def test_a_damaged_certificate_leaves_the_one_of_before(serve: Serve, authority: Authority) -> None:
    settings = tls(authority)
    server = await serve(**settings)
    good = settings["tls_certificate"].read_bytes()
    settings["tls_certificate"].write_bytes(b"half writ")
    assert await get(server, trusting(authority)) == "OK"
    settings["tls_certificate"].write_bytes(good)
    assert await get(server, trusting(authority)) == "OK"


async def test_mutual_tls(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    server = await serve(**tls(authority), tls_client_ca=authority.path)
    known = trusting(authority, authority.issue("granq-coordinator", file="client"))
    assert await get(server, known) == "OK"
    assert await get(server, trusting(authority)) == "UNAVAILABLE"
    foreign = trusting(authority, stranger.issue("granq-coordinator", file="foreign"))
    assert await get(server, foreign) == "UNAVAILABLE"


async def test_names_of_certificates_have_scopes(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    principals = tmp_path / "principals.toml"
    principals.write_text(
        credential("coordinator", ["service"], certificate='"granq-coordinator"')
        + credential("alice", ["read"], SERVICE_TOKEN)
    )
    server = await serve(**tls(authority), tls_client_ca=authority.path, principals_file=principals)
    coordinator = trusting(authority, authority.issue("granq-coordinator", file="coordinator"))
    other = trusting(authority, authority.issue("granq-other", file="other"))
    assert await get(server, coordinator) == "PERMISSION_DENIED", "services do not read artifacts through the API"
    assert await get(server, other) == "UNAUTHENTICATED"
    # A token comes before the certificate.
    assert await get(server, other, metadata=bearer(SERVICE_TOKEN)) == "OK"
    assert await get(server, coordinator, metadata=bearer("granq_wrong")) == "UNAUTHENTICATED"


@pytest.fixture
async def call_job(serve: Serve) -> AsyncIterator[Callable[..., Awaitable[jobs_pb2.Job]]]:
    clients: list[WorkerClient] = []

    async def call(server: GrpcServer, **security: Any) -> jobs_pb2.Job:
        client = WorkerClient(
            "quantizer",
            f"127.0.0.1:{server.port}",
            SecuritySettings(**security),
            max_message_bytes=4 * MIB,
            timeout_seconds=10,
            watch_timeout_seconds=10,
        )
        clients.append(client)
        return await client.get("j1")

    yield call
    for client in clients:
        await client.close()


async def test_services_call_each_other_with_certificates(
    serve: Serve, authority: Authority, call_job: Callable[..., Awaitable[jobs_pb2.Job]], tmp_path: Path
) -> None:
    server = await serve(**tls(authority), tls_client_ca=authority.path)
    certificate, key = authority.issue("granq-coordinator", file="coordinator")
    own = {"tls_certificate": certificate, "tls_key": key}
    job = await call_job(server, **own, tls_ca=authority.path)
    assert job.kind == "certificate:granq-coordinator"
    for wrong in ({"tls_ca": authority.path}, {**own, "tls_ca": Authority(tmp_path, "x").path}, own, {}):
        with pytest.raises(UnavailableError, match=r"^the quantizer does not answer$"):
            await call_job(server, **wrong)


async def test_services_call_each_other_with_tokens(
    serve: Serve, authority: Authority, call_job: Callable[..., Awaitable[jobs_pb2.Job]], tmp_path: Path
) -> None:
    principals, token = tmp_path / "principals.toml", tmp_path / "token"
    principals.write_text(credential("coordinator", ["service"], SERVICE_TOKEN))
    token.write_text(SERVICE_TOKEN + "\n")
    server = await serve(**tls(authority), principals_file=principals)
    security = {"tls_ca": authority.path, "service_token_file": token}
    assert (await call_job(server, **security)).kind == "coordinator"
    with pytest.raises(UnauthenticatedError):
        await call_job(server, tls_ca=authority.path)


async def test_a_long_lived_client_shows_new_certificates_and_tokens(
    serve: Serve, authority: Authority, tmp_path: Path
) -> None:
    principals, token = tmp_path / "principals.toml", tmp_path / "token"
    principals.write_text(credential("coordinator", ["service"], SERVICE_TOKEN))
    token.write_text(SERVICE_TOKEN)
    certificate, key = authority.issue("granq-coordinator", file="coordinator")
    server = await serve(**tls(authority), tls_client_ca=authority.path, principals_file=principals)
    security = SecuritySettings(
        tls_ca=authority.path, tls_certificate=certificate, tls_key=key, service_token_file=token
    )
    client = WorkerClient(
        "quantizer",
        f"127.0.0.1:{server.port}",
        security,
        max_message_bytes=4 * MIB,
        timeout_seconds=10,
        watch_timeout_seconds=10,
    )
    try:
        assert (await client.get("j1")).kind == "coordinator"
        token.write_text("granq_rotated-0123456789")
        principals.write_text(
            credential("rotated", ["service"], "granq_rotated-0123456789")
            + credential("renewed", ["service"], certificate='"granq-renewed"')
        )
        assert (await client.get("j1")).kind == "rotated"
        # The token goes; the certificate of before has no entry, that of now has one.
        principals.write_text(credential("renewed", ["service"], certificate='"granq-renewed"'))
        with pytest.raises(UnauthenticatedError):
            await client.get("j1")
    finally:
        await client.close()
    bare = SecuritySettings(tls_ca=authority.path, tls_certificate=certificate, tls_key=key)
    client = WorkerClient(
        "quantizer",
        f"127.0.0.1:{server.port}",
        bare,
        max_message_bytes=4 * MIB,
        timeout_seconds=10,
        watch_timeout_seconds=10,
    )
    try:
        with pytest.raises(UnauthenticatedError):
            await client.get("j1")
        authority.issue("granq-renewed", file="coordinator")
        assert (await client.get("j1")).kind == "renewed"
    finally:
        await client.close()


async def test_the_health_port_answers_probes_and_nothing_else(serve: Serve, authority: Authority) -> None:
    server = await serve(**tls(authority), tls_client_ca=authority.path, health_port=0)
    assert server.health_port
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = artifacts_pb2_grpc.ArtifactServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetArtifact(artifacts_pb2.GetArtifactRequest(digest=DIGEST), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await health.Check(health_pb2.HealthCheckRequest(), timeout=1)


async def test_metrics_stay_on_loopback_when_the_rest_is_open(
    serve: Serve, authority: Authority, tmp_path: Path
) -> None:
    principals = tmp_path / "principals.toml"
    principals.write_text(credential("alice", ["read"], SERVICE_TOKEN))
    server = await serve(host="0.0.0.0", **tls(authority), principals_file=principals)
    assert await get(server, trusting(authority), metadata=bearer(SERVICE_TOKEN)) == "OK"
    assert server.settings.monitoring_host == "127.0.0.1"
    page = await asyncio.to_thread(lambda: urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics").read())
    assert b"grpc_server_handled_total" in page
    # Another address of this machine's loopback network, on which the RPCs are served.
    with pytest.raises(URLError):
        await asyncio.to_thread(urlopen, f"http://127.0.0.2:{server.metrics_port}/metrics")


async def test_other_addresses_without_tls_are_refused_at_the_start(serve: Serve) -> None:
    with pytest.raises(FailedPreconditionError, match="refusing to listen"):
        await serve(host="0.0.0.0")
    assert await get(await serve(host="0.0.0.0", allow_insecure=True), None) == "OK"


async def test_files_that_are_unusable_end_the_start(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue()
    _, foreign = authority.issue(file="foreign")
    empty = tmp_path / "empty.pem"
    empty.touch()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tls_certificate": certificate, "tls_key": foreign}, "no pair"),
        ({"tls_certificate": empty, "tls_key": key}, "no pair"),
        ({"tls_certificate": tmp_path / "none.pem", "tls_key": key}, "cannot be read"),
        ({"tls_certificate": certificate, "tls_key": key, "tls_client_ca": empty}, "no certificates"),
        ({"principals_file": tmp_path / "none.toml"}, "cannot be read"),
    ]
    for settings, says in wrong:
        with pytest.raises(GranqError, match=says):
            await serve(**settings)
