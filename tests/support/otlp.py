"""A collector of OpenTelemetry traces: a gRPC server in this process that keeps what it is sent."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """One exported span; ids in hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    links: tuple[str, ...]
    error: bool
    seconds: float


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans of all services.

    Attributes:
        address: host:port.
    """

    def __init__(self) -> None:
        self.address = ""
        self._spans: list[Span] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the generated base class names it
        """Take spans."""
        for group in request.resource_spans:
            service = _attributes(group.resource.attributes)["service.name"]
            for scope in group.scope_spans:
                self._spans += [_span(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, name: str = "") -> list[Span]:
        """Return the spans so far, or those of a name."""
        return [span for span in tuple(self._spans) if name in ("", span.name)]

    def environment(self) -> dict[str, str]:
        """Return the variables that have a process send its spans here, soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address}", "OTEL_BSP_SCHEDULE_DELAY": "100"}


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _span(service: str, span: Any) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        _attributes(span.attributes),
        tuple(link.trace_id.hex() for link in span.links),
        span.status.code == span.status.STATUS_CODE_ERROR,
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
    )


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector on a free port."""
    collecting = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collecting, server)  # type: ignore[no-untyped-call]
    collecting.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collecting
    finally:
        server.stop(0).wait()
