"""Opens the channel to a server: retry policy, sizes, keepalive."""

import random
from importlib.resources import files

import grpc

# A watch may be silent for minutes; pings tell a quiet server from one that is gone. The project's servers allow them
# this often; a proxy that does not makes gRPC ping less and the watch connect again.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 60_000, 20_000
MAX_MESSAGE_BYTES = 16 * 1024 * 1024


def service_config() -> str:
    """Return the retry policy as a gRPC service config in JSON.

    Only methods that may be repeated are in it (SubmitPipeline because this client always sends a request id), only
    UNAVAILABLE is retried, and attempts are bounded.
    """
    return files("granq").joinpath("service_config.json").read_text("utf-8")


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """Open a channel to ``address`` ("host:port"); without credentials in plain text."""
    options: list[tuple[str, str | int]] = [
        ("grpc.enable_retries", 1),
        ("grpc.service_config", service_config()),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


class Backoff:
    """Waiting times in seconds between attempts: doubling up to a limit, with jitter so that clients spread out."""

    def __init__(self, first: float = 0.25, limit: float = 5.0) -> None:
        self._first, self._limit = first, limit
        self._next = first

    def reset(self) -> None:
        """Begin anew, after a success."""
        self._next = self._first

    def next(self) -> float:
        """Return how long to wait now."""
        wait, self._next = self._next, min(self._limit, self._next * 2)
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, keeps no secret
