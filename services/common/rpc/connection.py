"""Connections to other services of the deployment, with this service's credentials."""

import asyncio
from collections.abc import Sequence

import grpc

from services.common.errors import FailedPreconditionError
from services.common.rpc.tls import CallCredentials
from services.common.security import SecuritySettings, is_loopback

Options = Sequence[tuple[str, int | str]]


def call_credentials(address: str, settings: SecuritySettings) -> CallCredentials:
    """Return what this service shows to the one at an address.

    Raises:
        FailedPreconditionError: A token would be sent in plain text to another machine; or files are unusable.
    """
    host = address.rpartition(":")[0]
    plain = settings.tls_ca is None
    if plain and settings.service_token_file is not None and not (is_loopback(host) or settings.allow_insecure):
        raise FailedPreconditionError(
            f"service_token_file would be sent to {address} in plain text; set GRANQ_TLS_CA to use TLS",
            reason="INSECURE_ADDRESS",
            field="tls_ca",
        )
    return CallCredentials(settings)


def blocking_channel(address: str, credentials: CallCredentials, options: Options) -> grpc.Channel:
    """Open a channel that blocks, for one short-lived use."""
    channel = credentials.channel()
    return (
        grpc.insecure_channel(address, options) if channel is None else grpc.secure_channel(address, channel, options)
    )


class Connection:
    """A long-lived connection, opened anew when this service's certificates change.

    A channel keeps the certificates that it began with, and would show expired ones once it has to connect again.

    Args:
        address: host:port.
        settings: What to show there.
        options: Of the channel.
        linger_seconds: How long calls on the channel of before may go on after a change.

    Raises:
        FailedPreconditionError: As `call_credentials`.
    """

    def __init__(self, address: str, settings: SecuritySettings, options: Options, linger_seconds: float) -> None:
        self._address = address
        self._options = options
        self._linger_seconds = linger_seconds
        self._credentials = call_credentials(address, settings)
        self._closing: set[asyncio.Task[None]] = set()
        self._shown = self._credentials.channel()
        self._channel = self._open()

    def _open(self) -> grpc.aio.Channel:
        if self._shown is None:
            return grpc.aio.insecure_channel(self._address, options=self._options)
        return grpc.aio.secure_channel(self._address, self._shown, options=self._options)

    def channel(self) -> grpc.aio.Channel:
        """Return the channel for the next call."""
        shown = self._credentials.channel()
        if shown is not self._shown:
            old, self._shown = self._channel, shown
            self._channel = self._open()
            closing = asyncio.create_task(old.close(self._linger_seconds))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return self._channel

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of the next call."""
        return self._credentials.metadata()

    async def close(self) -> None:
        """Close all channels at once."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close(None)
