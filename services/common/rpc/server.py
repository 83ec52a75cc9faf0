"""Assembly of a gRPC server and its life: start, readiness, signals, graceful end."""

import asyncio
import gc
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from granq.v1 import jobs_pb2_grpc
from services.common.errors import GranqError, UnavailableError
from services.common.jobs import JobManager
from services.common.jobs.scratch import remove_abandoned
from services.common.jobs.servicer import JobServicer
from services.common.logs import configure_logging, get_logger
from services.common.memory import keep_freed_memory
from services.common.metrics import DISKS, MetricsServer, show_build, show_gpus
from services.common.rpc.exposure import check_exposure
from services.common.rpc.gate import Gate
from services.common.rpc.interceptors import CallInterceptor
from services.common.rpc.ready import write_ready_file
from services.common.rpc.tls import server_credentials
from services.common.settings import ServerSettings
from services.common.tracing import configure_tracing, shutdown_tracing

_log = get_logger("services.common.rpc")
_PLAIN_HANDLER_THREADS = 4
_MAX_PROBES = 64


class _Registrar:
    """Passes a servicer's handlers on to the server, notes the name of its service, and shows its methods' metrics."""

    def __init__(self, server: Any, interceptor: CallInterceptor) -> None:
        # Any: the type stubs lack add_registered_method_handlers, which generated code calls.
        self._server = server
        self._interceptor = interceptor
        self.names: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.names += [handler.service_name() for handler in handlers]
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        for name, handler in handlers.items():
            self._interceptor.expect(f"/{service}/{name}", handler)
        self._server.add_registered_method_handlers(service, handlers)


class GrpcServer:
    """One service's server with health, reflection, metrics and, where it has jobs, JobService.

    Args:
        name: Name of the service, for logs.
        settings: Its settings.
        jobs: Its jobs, which then end with the server.

    Attributes:
        port: Bound port of the RPCs, after `start`.
        metrics_port: Bound port of the metrics, after `start`.
        health_port: Bound port of the health checks alone, after `start`; None where there is none.
    """

    def __init__(self, name: str, settings: ServerSettings, jobs: JobManager | None = None) -> None:
        self.name = name
        self.settings = settings
        self.port = settings.port
        self.metrics_port = settings.metrics_port
        self.health_port = settings.health_port
        self._jobs = jobs
        self._servicers: list[tuple[Callable[[Any, Any], None], object]] = []
        self._resources: list[AbstractAsyncContextManager[Any]] = []
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: grpc.aio.Server | None = None
        self._stack = AsyncExitStack()
        if jobs is not None:
            self.add(jobs_pb2_grpc.add_JobServiceServicer_to_server, JobServicer(jobs))

    def add(self, register: Callable[[Any, Any], None], servicer: object) -> None:
        """Serve a service; `register` is the generated add_…Servicer_to_server. Call before `start`."""
        self._servicers.append((register, servicer))

    def manage(self, resource: AbstractAsyncContextManager[Any]) -> None:
        """Enter a resource before the server listens, and leave it after the last RPC. Call before `start`."""
        self._resources.append(resource)

    async def report(self, name: str, *, serving: bool) -> None:
        """Answer health checks for a name, beside those of the services."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def start(self) -> None:
        """Listen, and report SERVING.

        Raises:
            UnavailableError: A port is taken, or the host is not this machine's.
            FailedPreconditionError: The address is not safe to listen on, or certificates or principals are unusable.
        """
        check_exposure(self.settings)
        async with AsyncExitStack() as stack:
            for resource in self._resources:
                await stack.enter_async_context(resource)
            if self._jobs is not None:
                await asyncio.to_thread(remove_abandoned)
            pool = ThreadPoolExecutor(_PLAIN_HANDLER_THREADS, thread_name_prefix="handler")
            stack.callback(pool.shutdown, wait=False)
            server, names = self._assemble(pool)
            await self._bind(server, stack)
            stack.enter_context(DISKS.shown(self.settings))
            show_build(self.name)
            if self._jobs is not None:
                show_gpus()
            for name in names:
                await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
            await server.start()
            self._server = server
            self._stack = stack.pop_all()
        _log.info("server ready", service=self.name, port=self.port, metrics_port=self.metrics_port)

    async def _bind(self, server: grpc.aio.Server, stack: AsyncExitStack) -> None:
        """Take the ports; the metrics' and the health port are served from now on."""
        settings = self.settings
        address = _address(settings.host, settings.port)
        credentials = server_credentials(settings)
        try:
            self.port = (
                server.add_insecure_port(address)
                if credentials is None
                else server.add_secure_port(address, credentials)
            )
            metrics_server = MetricsServer(settings.monitoring_host, settings.metrics_port)
            stack.push_async_callback(asyncio.to_thread, metrics_server.close)
            self.metrics_port = metrics_server.port
            if settings.health_port is not None:
                probes = health_server(self._health)
                self.health_port = probes.add_insecure_port(_address(settings.monitoring_host, settings.health_port))
                await probes.start()
                stack.push_async_callback(probes.stop, 0)
        except (RuntimeError, OSError) as error:
            message = (
                f"cannot listen on {address} and, for metrics and health, on {settings.monitoring_host} with the ports "
                f"{settings.metrics_port} and {settings.health_port}: {error}"
            )
            raise UnavailableError(message, reason="PORT_TAKEN") from error

    def _assemble(self, pool: ThreadPoolExecutor) -> tuple[grpc.aio.Server, list[str]]:
        size = self.settings.max_message_bytes
        interceptor = CallInterceptor(pool, Gate(self.settings))
        server = grpc.aio.server(
            interceptors=[interceptor],
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                # Else a second server on the same port would get half of the calls without any error.
                ("grpc.so_reuseport", 0),
                # Watches may be silent for minutes; pings find out that the other side is gone.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Who connects and says nothing must not hold a connection for minutes.
                ("grpc.server_handshake_timeout_ms", 10_000),
            ],
        )
        registrar = _Registrar(server, interceptor)
        for register, servicer in self._servicers:
            register(servicer, registrar)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*registrar.names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server, registrar.names

    async def stop(self, grace: float | None = None) -> None:
        """Report NOT_SERVING, let RPCs and jobs end within the grace (default: of the settings), then end them."""
        if self._server is None:
            return
        server, self._server = self._server, None
        grace = self.settings.grace_seconds if grace is None else grace
        await self._health.enter_graceful_shutdown()
        ends = [server.stop(grace)]
        if self._jobs is not None:
            ends.append(self._jobs.close(grace))
        await asyncio.gather(*ends)
        await self._stack.aclose()
        _log.info("server stopped", service=self.name)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until idle for as long as the settings allow; raises as `start` does.

        A signal after that ends the grace.
        """
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[int] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signals.put_nowait, number)
        await self.start()
        # What is loaded by now stays until the end. A full garbage collection that looked through it would halt all
        # calls for a quarter of a second.
        gc.freeze()
        if self.settings.ready_file is not None:
            ports = (self.port, self.metrics_port, self.health_port)
            await asyncio.to_thread(write_ready_file, self.settings.ready_file, *ports)
        _log.info("server stops", service=self.name, reason=await self._reason_to_stop(signals))
        server = self._server
        stopping = asyncio.create_task(self.stop())
        impatient = asyncio.create_task(signals.get())
        await asyncio.wait((stopping, impatient), return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
        if not stopping.done():
            await asyncio.gather(
                *([server.stop(0)] if server is not None else []),
                *([self._jobs.close(0)] if self._jobs is not None else []),
            )
        await stopping

    async def _reason_to_stop(self, signals: asyncio.Queue[int]) -> str:
        """Return the name of the next signal, or "IDLE" once the jobs have retired."""
        signalled = asyncio.create_task(signals.get())
        reasons: list[asyncio.Task[Any]] = [signalled]
        if self._jobs is not None and self.settings.exit_when_idle_seconds:
            reasons.append(asyncio.create_task(self._jobs.retire(self.settings.exit_when_idle_seconds)))
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        for task in reasons:
            task.cancel()
        return signal.Signals(signalled.result()).name if signalled.done() else "IDLE"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def health_server(servicer: Any) -> grpc.aio.Server:
    """Return a server of the health service and nothing else, for probes that know neither TLS nor tokens."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=_MAX_PROBES)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return server


def run(name: str, settings: ServerSettings, create_server: Callable[[Any], GrpcServer]) -> None:
    """Configure logging and serve until a signal; what a service's __main__ calls.

    Args:
        name: Name of the service, in each log record.
        settings: The service's settings, given to `create_server`.
        create_server: Assembles the server; called within the event loop.

    Raises:
        SystemExit: With code 1, when the server cannot start; the log says why.
    """
    configure_logging(settings.log_format, settings.log_level, {"service": name})

    keep_freed_memory()

    async def serve() -> None:
        await create_server(settings).run()

    try:
        configure_tracing(name)
        asyncio.run(serve())
    except GranqError as error:
        _log.error("server cannot start", service=name, reason=error.reason, error=error.message)
        sys.exit(1)
    finally:
        shutdown_tracing()
