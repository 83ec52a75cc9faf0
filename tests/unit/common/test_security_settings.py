"""Settings of transport and access: what fits together, and where a server may listen."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.common.errors import FailedPreconditionError
from services.common.rpc.connection import call_credentials
from services.common.rpc.exposure import check_exposure
from services.common.security import SecuritySettings, is_loopback
from services.common.settings import ServerSettings

FILE = Path("/some/file.pem")
TLS: dict[str, Any] = {"tls_certificate": FILE, "tls_key": FILE}
OIDC = {"oidc_issuer": "https://i", "oidc_audience": "granq", "oidc_jwks_url": "https://i/keys"}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("2130706433", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_certificate": FILE}, "go together"),
        ({"tls_key": FILE}, "go together"),
        ({"tls_client_ca": FILE}, "needs tls_certificate"),
        ({"oidc_issuer": "https://i"}, "set all or none"),
        ({**OIDC, "oidc_jwks_url": "http://example.org/keys"}, "https"),
        ({**OIDC, "oidc_jwks_url": "file:///etc/passwd"}, "https"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SecuritySettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [{}, TLS, OIDC, {"principals_file": FILE}, {"tls_ca": FILE, "service_token_file": FILE}],
    ids=lambda settings: ",".join(settings) or "nothing",
)
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_addresses_need_tls_and_credentials(host: str, settings: dict[str, Any]) -> None:
    with pytest.raises(FailedPreconditionError, match=f"refusing to listen on {host}") as caught:
        check_exposure(ServerSettings(host=host, **settings))
    assert "GRANQ_ALLOW_INSECURE" in caught.value.message
    assert ("GRANQ_TLS_CERTIFICATE" in caught.value.message) is ("tls_certificate" not in settings)
    check_exposure(ServerSettings(host=host, allow_insecure=True, **settings))
    check_exposure(ServerSettings(**settings))


@pytest.mark.parametrize(
    "proof", [OIDC, {"principals_file": FILE}, {"tls_client_ca": FILE}], ids=lambda proof: next(iter(proof))
)
def test_tls_with_credentials_may_listen_anywhere(proof: dict[str, Any]) -> None:
    check_exposure(ServerSettings(host="0.0.0.0", **TLS, **proof))


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({}, "127.0.0.1"),
        ({"host": "::1"}, "::1"),
        ({"host": "0.0.0.0"}, "127.0.0.1"),
        ({"host": "0.0.0.0", "allow_insecure": True}, "0.0.0.0"),
        ({"host": "0.0.0.0", "monitoring_host": "10.0.0.1"}, "10.0.0.1"),
    ],
    ids=str,
)
def test_plain_ports_stay_on_loopback_unless_told(settings: dict[str, Any], address: str) -> None:
    made = ServerSettings(**settings)
    assert made.monitoring_host == address
    # A job's process builds the settings again from what its server had.
    assert ServerSettings.model_validate_json(made.model_dump_json()) == made


def test_a_service_token_does_not_travel_in_plain_text(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("granq_x-0123456789\n")
    with pytest.raises(FailedPreconditionError, match="in plain text"):
        call_credentials("quantizer:50052", SecuritySettings(service_token_file=token))
    for address, insecure in (("127.0.0.1:50052", False), ("quantizer:50052", True)):
        settings = SecuritySettings(service_token_file=token, allow_insecure=insecure)
        assert call_credentials(address, settings).metadata() == (("authorization", "Bearer granq_x-0123456789"),)


@pytest.mark.parametrize("content", ["", " \n", "a\nb", "tökén"])
def test_files_without_a_token_are_refused(tmp_path: Path, content: str) -> None:
    token = tmp_path / "token"
    token.write_text(content)
    with pytest.raises(FailedPreconditionError, match="holds no token"):
        call_credentials("127.0.0.1:1", SecuritySettings(service_token_file=token))
