"""Prometheus metrics of all servers, and the HTTP port that serves them.

Labels are bounded: methods, codes, kinds of jobs and names of losses, never an id.
"""

import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Gauge, Histogram, start_http_server

RPCS = Counter("granq_rpc", "RPCs that ended.", ["method", "code"])
RPC_SECONDS = Histogram(
    "granq_rpc_duration_seconds",
    "Time from an RPC's first message to its status.",
    ["method", "code"],
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600, 3600),
)
RPCS_IN_FLIGHT = Gauge("granq_rpc_in_flight", "RPCs that are served now.", ["method"])

JOBS = Counter("granq_jobs", "Runs of jobs that ended.", ["kind", "outcome"])
JOB_SECONDS = Histogram(
    "granq_job_duration_seconds",
    "Time from a job's start in its process to its end.",
    ["kind", "outcome"],
    buckets=(0.5, 2, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600),
)
JOBS_RUNNING = Gauge("granq_jobs_running", "Jobs whose process runs.", ["kind"])
JOBS_QUEUED = Gauge("granq_jobs_queued", "Jobs that wait for a free slot.", ["kind"])

ARTIFACT_BYTES = Counter("granq_artifact_bytes", "Bytes moved to (write) and from (read) the store.", ["direction"])

TRAINING_LOSS = Gauge("granq_training_loss", "Latest value of a loss.", ["kind", "loss"])
TRAINING_RATE = Gauge("granq_training_iterations_per_second", "Latest speed of training; 0 when none runs.", ["kind"])

_LOSS = re.compile(r"loss(_[a-z0-9]+){0,4}")
_MAX_LOSSES = 32
_losses: dict[str, set[str]] = {}


def observe_training(kind: str, figures: Mapping[str, float]) -> None:
    """Take over what a job of this kind reported: its "loss…" figures and its "iterations_per_second".

    Other figures and, so that series stay bounded, losses beyond the first 32 names of a kind are left out.
    """
    known = _losses.setdefault(kind, set())
    for name, value in figures.items():
        if name == "iterations_per_second":
            TRAINING_RATE.labels(kind).set(value)
        elif _LOSS.fullmatch(name) and (name in known or len(known) < _MAX_LOSSES):
            known.add(name)
            TRAINING_LOSS.labels(kind, name).set(value)


def end_training(kind: str) -> None:
    """Show that no job of this kind trains any more; the last losses stay visible."""
    if kind in _losses:
        TRAINING_RATE.labels(kind).set(0)


class MetricsServer:
    """Serves this process's metrics at /metrics from a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Bind and serve; port 0 lets the system choose.

        Raises:
            OSError: The address is taken or not this machine's.
        """
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host)
        self._host = host if host not in ("0.0.0.0", "::") else "localhost"  # noqa: S104
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving and free the port."""
        ending = threading.Thread(target=self._server.shutdown)
        ending.start()
        # The serving thread looks for its end every half second; a connection wakes it now.
        with suppress(OSError), socket.create_connection((self._host, self.port), timeout=1):
            ending.join()
        ending.join()
        self._server.server_close()
        self._thread.join()
