"""What `tracing` does once it is on. The one module that imports OpenTelemetry."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_CLOSE_MILLISECONDS = 2000
_PROPAGATOR = TraceContextTextMapPropagator()
# Ids that the next root span gets, where they are not random.
_given: ContextVar[trace.SpanContext | None] = ContextVar("given", default=None)
# Ends of RPCs that are the server's fault, which alone make its span an error.
_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")


class _Ids(RandomIdGenerator):
    """Random ids, but for root spans whose ids are known beforehand."""

    def generate_trace_id(self) -> int:
        given = _given.get()
        return super().generate_trace_id() if given is None else given.trace_id

    def generate_span_id(self) -> int:
        given = _given.get()
        return super().generate_span_id() if given is None else given.span_id


def _continued(carrier: Mapping[str, str]) -> contexts.Context:
    return _PROPAGATOR.extract(carrier, contexts.Context())


class RpcSpan:
    """The span of an RPC at its server.

    It becomes the current one and stays it: gRPC serves each RPC in a task of its own, whose end also ends that, and a
    stream may be closed from another task, which could not put back what was the current one here.
    """

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        contexts.attach(trace.set_span_in_context(span))

    def end(self, code: str) -> dict[str, str]:
        """Note the status that the RPC ended with, end the span, and return the exemplar by which it is found."""
        self._span.set_attribute("rpc.response.status_code", code)
        if code in _FAULTS:
            self._span.set_status(trace.StatusCode.ERROR, code)
        self._span.end()
        return {"trace_id": trace.format_trace_id(self._span.get_span_context().trace_id)}


class PhaseSpans:
    """Spans one after the other below the same parent; usable from any thread, one at a time."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._parent = contexts.get_current()
        self._span: trace.Span | None = None

    def enter(self, phase: str) -> None:
        """End the phase before, and begin one."""
        self.end()
        self._span = self._tracer.start_span(f"phase {phase}", self._parent)

    def end(self) -> None:
        """End the last phase."""
        if self._span is not None:
            self._span.end()
            self._span = None


class Tracer:
    """Exports this process' spans by OTLP.

    Args:
        service: Name of the service.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        named = Resource({SERVICE_NAME: f"granq-{service}", SERVICE_VERSION: version("granq-pipeline")})
        # What the operator says in OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES goes before.
        resource = Resource.create().merge(named).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(id_generator=_Ids(), resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("granq", version("granq-pipeline"))

    def close(self) -> None:
        """Send what has not been sent, and stop; a collector that is away holds nobody up for long."""
        self._provider.force_flush(_CLOSE_MILLISECONDS)

    @contextmanager
    def span(self, name: str, parent: Mapping[str, str] | None, attributes: Mapping[str, str | int]) -> Iterator[Any]:
        """See `tracing.span`."""
        context = None if parent is None else _continued(parent)
        with self._tracer.start_as_current_span(name, context, attributes=attributes) as span:
            yield span

    def begin_rpc(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> RpcSpan:
        """Begin the span of an RPC."""
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        name = method.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        kind = trace.SpanKind.SERVER
        return RpcSpan(self._tracer.start_span(name, _continued(carrier), kind, attributes))

    def carrier(self) -> dict[str, str]:
        """Return the current span as W3C headers."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier

    def current_ids(self) -> dict[str, str]:
        """See `tracing.current_ids`."""
        found = trace.get_current_span().get_span_context()
        if not found.is_valid:
            return {}
        return {"trace_id": trace.format_trace_id(found.trace_id), "span_id": trace.format_span_id(found.span_id)}

    def record_root(
        self, name: str, ids: Mapping[str, str], attributes: Mapping[str, str | int], begin_ns: int, end_ns: int
    ) -> None:
        """Export a span without a parent whose ids are given."""
        token = _given.set(trace.get_current_span(_continued(ids)).get_span_context())
        try:
            span = self._tracer.start_span(name, contexts.Context(), attributes=attributes, start_time=begin_ns)
        finally:
            _given.reset(token)
        self.note_outcome(span, str(attributes["granq.outcome"]))
        span.end(end_ns)

    def note_outcome(self, span: trace.Span, outcome: str) -> None:
        """See `tracing.note_outcome`."""
        span.set_attribute("granq.outcome", outcome)
        if outcome == "failed":
            span.set_status(trace.StatusCode.ERROR)

    def link(self, carrier: Mapping[str, str]) -> None:
        """Have the current span point at another."""
        trace.get_current_span().add_link(trace.get_current_span(_continued(carrier)).get_span_context())

    def phases(self) -> PhaseSpans:
        """Return spans of phases below the current one."""
        return PhaseSpans(self._tracer)
