"""The HTTP port that serves this process' metrics, in Prometheus' text format or, when asked for it, in OpenMetrics."""

import socket
import threading
from contextlib import suppress
from wsgiref.simple_server import WSGIServer

from prometheus_client import disable_created_metrics, start_http_server

# One more series for each counter, which tells what process_start_time_seconds tells.
disable_created_metrics()  # type: ignore[no-untyped-call]


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
