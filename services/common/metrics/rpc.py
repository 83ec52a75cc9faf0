"""What a server tells of its RPCs, under the names that gRPC's Prometheus interceptors of other languages use."""

import time
from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

_METHOD = ("grpc_type", "grpc_service", "grpc_method")

STARTED = Counter("grpc_server_started", "RPCs that began.", _METHOD)
HANDLED = Counter("grpc_server_handled", "RPCs that ended, by status.", (*_METHOD, "grpc_code"))
RECEIVED = Counter("grpc_server_msg_received", "Messages received from clients.", _METHOD)
SENT = Counter("grpc_server_msg_sent", "Messages sent to clients.", _METHOD)
SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time from an RPC's begin to its status; of a stream, its whole life.",
    _METHOD,
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600, 3600),
)
IN_FLIGHT = Gauge("grpc_server_in_flight", "RPCs that are served now.", _METHOD)

_TYPES = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}
# Ends that a server answers for. Their series exist from the start, so that the first such end shows as an increase.
_FAULTS = ("OK", "UNKNOWN", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")


class MethodMetrics:
    """The series of one method; looked up once, since finding a series costs more than counting in it.

    Args:
        name: Full name, such as "/granq.v1.JobService/GetJob".
        request_streams: Whether the client sends a stream.
        response_streams: Whether the server sends one.
    """

    def __init__(self, name: str, request_streams: bool, response_streams: bool) -> None:
        self.name = name
        service, _, method = name.removeprefix("/").rpartition("/")
        labels = (_TYPES[request_streams, response_streams], service, method)
        self.received = RECEIVED.labels(*labels)
        self.sent = SENT.labels(*labels)
        self._started = STARTED.labels(*labels)
        self._seconds = SECONDS.labels(*labels)
        self._in_flight = IN_FLIGHT.labels(*labels)
        self._labels = labels
        self._handled = {code: HANDLED.labels(*labels, code) for code in _FAULTS}

    def begin(self) -> float:
        """Count an RPC that begins; return the time of its begin, for `end`."""
        self._started.inc()
        self._in_flight.inc()
        return time.monotonic()

    def end(self, began: float, code: str, exemplar: Mapping[str, str] | None) -> float:
        """Count its end.

        Args:
            began: What `begin` returned.
            code: Name of its status, such as "OK".
            exemplar: What to find it by in logs and traces; None for nothing.

        Returns:
            Seconds that it took.
        """
        seconds = time.monotonic() - began
        self._in_flight.dec()
        if (handled := self._handled.get(code)) is None:
            handled = self._handled[code] = HANDLED.labels(*self._labels, code)
        handled.inc()
        self._seconds.observe(seconds, None if exemplar is None else dict(exemplar))
        return seconds


def count_unknown_method() -> None:
    """Count an RPC to a method that there is not; not by its name, since a caller could make up any number of them."""
    HANDLED.labels("unary", "unknown", "unknown", "UNIMPLEMENTED").inc()
