"""Finds out who calls, from a bearer token or from the certificate that the caller showed."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from services.common.errors import UnauthenticatedError
from services.common.principal import ANONYMOUS, Principal, Scope
from services.common.rpc.oidc import OidcTokens
from services.common.rpc.principals import Principals
from services.common.security import SecuritySettings

_BEARER = "bearer "
# gRPC refuses calls at random, from 8 KiB of metadata on, all of it counted.
_MAX_TOKEN = 6144
_ADMIN = frozenset({Scope.ADMIN})


class Authenticator:
    """Asks callers for what the settings name; nobody for anything where they name nothing.

    Args:
        settings: The server's settings.

    Raises:
        FailedPreconditionError: The file of principals is not readable.
    """

    def __init__(self, settings: SecuritySettings) -> None:
        self.asks = settings.asks_who_calls
        self._principals = Principals(settings.principals_file) if settings.principals_file is not None else None
        self._oidc = OidcTokens(settings) if settings.oidc_issuer else None
        self._certificates = settings.tls_client_ca is not None

    async def identify(
        self, metadata: Iterable[tuple[str, str | bytes]], certificate: Callable[[], Mapping[str, Iterable[bytes]]]
    ) -> Principal:
        """Return who calls.

        Args:
            metadata: Of the call. A token in it comes before the certificate.
            certificate: Returns gRPC's authentication context of the connection.

        Raises:
            UnauthenticatedError: The credentials are missing, unknown or expired.
            UnavailableError: The identity provider's keys cannot be fetched.
        """
        if not self.asks:
            return ANONYMOUS
        values = [value for key, value in metadata if key == "authorization"]
        if values:
            return await self._of_token(_token(values))
        if self._certificates:
            return self._of_certificate(_names(certificate()))
        raise UnauthenticatedError(
            'this server asks for a token: send the metadata "authorization: Bearer …"', reason="CREDENTIALS_MISSING"
        )

    async def _of_token(self, token: str) -> Principal:
        known = self._principals.of_token(token) if self._principals is not None else None
        if known is None and self._oidc is not None:
            known = self._oidc.remembered(token) or await asyncio.to_thread(self._oidc.verify, token)
        if known is None:
            raise UnauthenticatedError("the token is not known here", reason="CREDENTIALS_INVALID")
        return known

    def _of_certificate(self, names: list[str]) -> Principal:
        if self._principals is not None and (known := self._principals.of_certificate(names)) is not None:
            return known
        if names and self._principals is None and self._oidc is None:
            # The authorities of tls_client_ca are then all that the operator asks for.
            return Principal(f"certificate:{names[0]}", _ADMIN)
        raise UnauthenticatedError(
            "the certificate's name has no entry here, and no token came with the call", reason="CREDENTIALS_INVALID"
        )


def _token(values: list[str | bytes]) -> str:
    value = values[0]
    if len(values) != 1 or not isinstance(value, str) or not value.lower().startswith(_BEARER):
        raise UnauthenticatedError(
            'the metadata "authorization" must be "Bearer …", once', reason="CREDENTIALS_INVALID"
        )
    token = value[len(_BEARER) :].strip()
    if not 0 < len(token) <= _MAX_TOKEN:
        raise UnauthenticatedError("the token is empty or too long", reason="CREDENTIALS_INVALID")
    return token


def _names(certificate: Mapping[str, Iterable[bytes]]) -> list[str]:
    """Return the alternative names of a caller's certificate, or its common name where it has none."""
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        if names := [name.decode("utf-8", "replace") for name in certificate.get(kind, ())]:
            return names
    return []
