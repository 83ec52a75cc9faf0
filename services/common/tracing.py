"""OpenTelemetry traces: off unless the environment names an exporter; then nothing of OpenTelemetry is even imported.

On where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, or OTEL_TRACES_EXPORTER is "otlp";
OTEL_SDK_DISABLED=true and OTEL_TRACES_EXPORTER=none turn it off. The SDK reads all else from its standard variables.

The trace of a pipeline is found by its id: trace id and root span are made from the pipeline's id and the number of its
attempt. So stages that different processes carry out, before and after a crash, are in one trace without anything being
stored, and whoever knows a pipeline knows its trace.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from services.common.errors import FailedPreconditionError

if TYPE_CHECKING:
    from services.common.tracer import RpcSpan, Tracer

Carrier = Mapping[str, str]
"""What a trace is continued from: the W3C header "traceparent", and "service" for a process of the same service."""

_SERVICE = "service"
_NOTHING: AbstractContextManager[Any] = nullcontext()
_tracer: "Tracer | None" = None


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment turns traces on."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return exporter == "otlp" or any(environment.get(name) for name in endpoints)


def configure_tracing(service: str) -> None:
    """Begin to export this process' spans, if the environment wants that.

    Args:
        service: Name of the service; OTEL_SERVICE_NAME, where set, goes before it.

    Raises:
        FailedPreconditionError: It does, and the packages are not installed, or it names a protocol that they lack.
    """
    global _tracer
    if not wanted():
        return
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "grpc"):
        raise FailedPreconditionError(
            f"traces are exported by grpc, not by {protocol!r}: unset OTEL_EXPORTER_OTLP_PROTOCOL, and name the "
            "collector's gRPC port in OTEL_EXPORTER_OTLP_ENDPOINT",
            reason="TRACING_PROTOCOL",
        )
    try:
        from services.common.tracer import Tracer
    except ImportError as error:
        raise FailedPreconditionError(
            "the environment asks for traces (OTEL_…), and OpenTelemetry is not installed: "
            "pip install 'granq-pipeline[tracing]', or set OTEL_SDK_DISABLED=true",
            reason="TRACING_NOT_INSTALLED",
        ) from error
    _tracer = Tracer(service)


def shutdown_tracing() -> None:
    """Send what has not been sent, for two seconds at most, and stop."""
    global _tracer
    tracer, _tracer = _tracer, None
    if tracer is not None:
        tracer.close()


def enabled() -> bool:
    """Return whether this process exports spans."""
    return _tracer is not None


def span(name: str, parent: Carrier | None = None, **attributes: str | int) -> AbstractContextManager[Any]:
    """Return a block whose time becomes a span; what is raised in it is noted there.

    Args:
        name: What is done; few different ones.
        parent: What it belongs to; by default the span around it.
        attributes: Facts, under names such as "granq.job.id", with "_" for ".".
    """
    if _tracer is None:
        return _NOTHING
    return _tracer.span(name, parent, {key.replace("_", "."): value for key, value in attributes.items()})


def note_outcome(span: Any, outcome: str) -> None:
    """Note how what a span stands for ended, "failed" as an error; `span` is what the block of `span` gave."""
    if _tracer is not None and span is not None:
        _tracer.note_outcome(span, outcome)


def begin_rpc(method: str, metadata: Any) -> "RpcSpan | None":
    """Begin the span of an RPC, which continues its caller's trace; None when tracing is off.

    Args:
        method: Full name, such as "/granq.v1.JobService/GetJob".
        metadata: What the caller sent with it.
    """
    return None if _tracer is None else _tracer.begin_rpc(method, metadata)


def handover() -> dict[str, str]:
    """Return what a process needs to continue the current trace; empty when tracing is off."""
    return {} if _tracer is None else {**_tracer.carrier(), _SERVICE: _tracer.service}


def take_over(carrier: Carrier) -> None:
    """Configure tracing in a process that was given `handover`'s answer; raises as `configure_tracing` does."""
    if carrier:
        configure_tracing(carrier[_SERVICE])


def outgoing() -> tuple[tuple[str, str], ...]:
    """Return the metadata that lets the server of an RPC continue the current trace; none when tracing is off."""
    return () if _tracer is None else tuple(_tracer.carrier().items())


def current_ids() -> dict[str, str]:
    """Return "trace_id" and "span_id" of the current span in hexadecimal; empty without one."""
    return {} if _tracer is None else _tracer.current_ids()


def exemplar(**labels: str) -> dict[str, str] | None:
    """Return what finds an observation again in logs and traces: the labels, and the current trace's id if any."""
    ids = current_ids()
    found = {**labels, **({"trace_id": ids["trace_id"]} if ids else {})}
    return found or None


def pipeline_trace(pipeline_id: str, attempt: int) -> dict[str, str]:
    """Return the carrier of a pipeline's own trace."""
    digest = hashlib.sha256(f"{pipeline_id}/{attempt}".encode()).hexdigest()
    return {"traceparent": f"00-{digest[:32]}-{digest[32:48]}-01"}


def record_pipeline(pipeline_id: str, attempt: int, outcome: str, begin_us: int, end_us: int) -> None:
    """Export the root span of a pipeline that has ended. Times are in microseconds since the epoch."""
    if _tracer is not None:
        attributes: dict[str, str | int] = {
            "granq.pipeline.id": pipeline_id,
            "granq.attempt": attempt,
            "granq.outcome": outcome,
        }
        _tracer.record_root(
            "pipeline", pipeline_trace(pipeline_id, attempt), attributes, begin_us * 1000, end_us * 1000
        )


def link_pipeline(pipeline_id: str, attempt: int) -> None:
    """Have the current span point at the trace of a pipeline that it began."""
    if _tracer is not None:
        _tracer.link(pipeline_trace(pipeline_id, attempt))


class Phases:
    """Spans of a job's phases, one after the other, below the span that is the current one now."""

    def __init__(self) -> None:
        self._phases = None if _tracer is None else _tracer.phases()

    def enter(self, phase: str) -> None:
        """End the phase before, and begin one."""
        if self._phases is not None:
            self._phases.enter(phase)

    def end(self) -> None:
        """End the last phase."""
        if self._phases is not None:
            self._phases.end()
