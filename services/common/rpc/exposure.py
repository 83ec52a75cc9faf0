"""Keeps a server without TLS or credentials from listening where other machines reach it."""

from services.common.errors import FailedPreconditionError
from services.common.security import is_loopback
from services.common.settings import ServerSettings


def check_exposure(settings: ServerSettings) -> None:
    """Do nothing when a server may listen where its settings say.

    Raises:
        FailedPreconditionError: The address is not loopback, and TLS or credentials are missing.
    """
    if settings.allow_insecure or is_loopback(settings.host):
        return
    missing = [] if settings.tls_certificate is not None else ["TLS (GRANQ_TLS_CERTIFICATE and GRANQ_TLS_KEY)"]
    if not settings.asks_who_calls:
        missing.append("credentials (GRANQ_PRINCIPALS_FILE, GRANQ_OIDC_ISSUER or GRANQ_TLS_CLIENT_CA)")
    if missing:
        raise FailedPreconditionError(
            f"refusing to listen on {settings.host} without {' and without '.join(missing)}; set them, listen on "
            "127.0.0.1, or set GRANQ_ALLOW_INSECURE=true if the network lets in nobody who may not do everything",
            reason="INSECURE_ADDRESS",
            field="host",
        )
