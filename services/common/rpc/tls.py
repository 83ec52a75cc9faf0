"""TLS of servers and of calls to other services, with certificates that may change while a server runs."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from services.common.errors import FailedPreconditionError
from services.common.security import SecuritySettings
from services.common.watched import Watched


@dataclass(frozen=True)
class Identity:
    """A private key in PEM, and its certificate chain."""

    key: bytes
    certificate: bytes


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPreconditionError(f"{setting} {path} cannot be read: {error.strerror}", field=setting) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def read_identity(certificate: Path, key: Path) -> Identity:
    """Read a certificate and its key.

    Raises:
        FailedPreconditionError: One cannot be read, or the key is not the certificate's.
    """
    identity = Identity(_read(key, "tls_key"), _read(certificate, "tls_certificate"))
    try:
        # gRPC would refuse each connection without saying why.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, _no_password)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or str(error)
        raise FailedPreconditionError(
            f"tls_certificate {certificate} and tls_key {key} are no pair in PEM: {why}", field="tls_certificate"
        ) from error
    return identity


def read_authorities(path: Path, setting: str) -> bytes:
    """Read the certificates of authorities; raises FailedPreconditionError when there are none in the file."""
    content = _read(path, setting)
    try:
        ssl.create_default_context(cafile=str(path))
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(f"{setting} {path} holds no certificates in PEM", field=setting) from error
    return content


def server_credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    """Return the credentials of a server, which follow their files with each new connection; None without TLS.

    Raises:
        FailedPreconditionError: The files are not what they should be.
    """
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if certificate is None or key is None:
        return None

    def load() -> grpc.ServerCertificateConfiguration:
        identity = read_identity(certificate, key)
        roots = read_authorities(client_ca, "tls_client_ca") if client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], roots)

    files = [path for path in (certificate, key, client_ca) if path is not None]
    watched = Watched(files, load)
    return grpc.dynamic_ssl_server_credentials(
        watched.get(), watched.get, require_client_authentication=client_ca is not None
    )


class CallCredentials:
    """What this service shows to others: a certificate over TLS, a token, both or neither; follows their files.

    Args:
        settings: Where they are.

    Raises:
        FailedPreconditionError: The files are not what they should be.
    """

    def __init__(self, settings: SecuritySettings) -> None:
        self._settings = settings
        files = [path for path in (settings.tls_ca, settings.tls_certificate, settings.tls_key) if path is not None]
        self._channel = Watched(files, self._load_channel)
        token_file = settings.service_token_file
        self._token = Watched([token_file], lambda: read_token(token_file)) if token_file is not None else None

    def _load_channel(self) -> grpc.ChannelCredentials | None:
        settings = self._settings
        if settings.tls_ca is None:
            return None
        roots = read_authorities(settings.tls_ca, "tls_ca")
        if settings.tls_certificate is None or settings.tls_key is None:
            return grpc.ssl_channel_credentials(roots)
        identity = read_identity(settings.tls_certificate, settings.tls_key)
        return grpc.ssl_channel_credentials(roots, identity.key, identity.certificate)

    def channel(self) -> grpc.ChannelCredentials | None:
        """Return the credentials of a channel, another object after each change; None for plain text."""
        return self._channel.get()

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that a call carries."""
        return (("authorization", f"Bearer {self._token.get()}"),) if self._token is not None else ()


def read_token(path: Path) -> str:
    """Read the token of a file; raises FailedPreconditionError where there is none."""
    token = _read(path, "service_token_file").decode("ascii", "replace").strip()
    if not token or any(not 0x20 < ord(letter) < 0x7F for letter in token):
        raise FailedPreconditionError(f"service_token_file {path} holds no token", field="service_token_file")
    return token
