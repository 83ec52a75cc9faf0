"""What a client shows to a server: TLS, a certificate of its own, a bearer token."""

import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

PathLike = str | os.PathLike[str]


def channel_credentials(
    ca: PathLike | None, certificate: PathLike | None, key: PathLike | None, tls: bool
) -> grpc.ChannelCredentials | None:
    """Return credentials made of PEM files, None for plain text.

    Args:
        ca: Authorities to trust. Default: those that gRPC knows, as browsers do.
        certificate: The client's own certificate chain, for servers that ask for one.
        key: The certificate's private key.
        tls: TLS even where no file is given.

    Raises:
        OSError: A file cannot be read.
        ValueError: Of certificate and key only one is given.
    """
    if (certificate is None) != (key is None):
        raise ValueError("a certificate and its key go together: give both or neither")
    if ca is None and certificate is None and not tls:
        return None
    files = [None if path is None else Path(path).read_bytes() for path in (ca, key, certificate)]
    return grpc.ssl_channel_credentials(*files)


def check_plain_token(address: str) -> None:
    """Raise ValueError where a token would be sent to another machine without TLS."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise ValueError(f"the token would be sent to {address} in plain text; use TLS: give ca, or tls=True")


def read_token(path: PathLike) -> str:
    """Return the token of a file; raises OSError when it cannot be read, ValueError when there is none in it."""
    token = Path(path).read_text("utf-8").strip()
    if not token:
        raise ValueError(f"{os.fspath(path)} holds no token")
    return token


class TokenInterceptor(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Sends a token with every call.

    Args:
        token: Returns the token; asked for each call, so that it may change.
    """

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    def _call(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), ("authorization", f"Bearer {self._token()}"))
        return continuation(_Details(details, metadata), request)

    intercept_unary_unary: Any = _call
    intercept_unary_stream: Any = _call
    intercept_stream_unary: Any = _call
    intercept_stream_stream: Any = _call


class _Details(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, details: Any, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression
        self.metadata = metadata
