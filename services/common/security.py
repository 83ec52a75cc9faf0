"""Settings of transport and access that all servers share: TLS, who may call, and how much. See docs/security.md."""

import ipaddress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own and no other machine's; names other than localhost are not."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class SecuritySettings(BaseSettings):
    """Part of the settings of one server; `ServerSettings` adds the rest."""

    allow_insecure: bool = Field(
        default=False,
        description="Listen beyond loopback without TLS or without asking who calls, and send tokens in plain text; "
        "for networks that keep strangers out by other means.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file with this service's certificate and its intermediates; turns TLS on."
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the certificate's private key, unencrypted.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file with the authorities whose certificates callers must show (mutual TLS)."
    )
    tls_ca: Path | None = Field(
        default=None,
        description="PEM file with the authorities of the services that this one calls; calls then use TLS, and show "
        "the certificate of tls_certificate if there is one.",
    )
    service_token_file: Path | None = Field(
        default=None, description="File with the bearer token that this service shows to those that it calls."
    )
    principals_file: Path | None = Field(
        default=None, description="TOML file with hashed tokens and certificate names, and what each may do."
    )
    oidc_issuer: str = Field(default="", description="Issuer (iss) of the JSON Web Tokens that are accepted.")
    oidc_audience: str = Field(default="", description="Audience (aud) that such a token must be for.")
    oidc_jwks_url: str = Field(default="", description="https URL of the issuer's public keys (JWKS).")
    oidc_name_claim: str = Field(default="sub", min_length=1, description="Claim with the caller's stable name.")
    oidc_scope_claim: str = Field(default="scope", min_length=1, description="Claim with the scopes: text or a list.")
    max_concurrent_rpcs: int = Field(
        default=4096, ge=1, le=1_000_000, description="Calls served at once; more fail with RESOURCE_EXHAUSTED."
    )
    max_principal_rpcs: int = Field(
        default=256, ge=1, le=1_000_000, description="Calls served at once for one principal, streams included."
    )
    principal_rpcs_per_second: float = Field(
        default=100.0, gt=0, le=1e6, description="Calls per second that one principal may begin, in the long run."
    )
    principal_rpc_burst: int = Field(
        default=200, ge=1, le=1_000_000, description="Calls that one principal may begin at once after a pause."
    )
    max_stream_messages: int = Field(
        default=10_000_000, ge=1, description="Messages that a caller may send in one stream."
    )

    @field_validator("oidc_jwks_url")
    @classmethod
    def _trustworthy(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise ValueError("must be an https URL; http is for loopback alone")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: set both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if len({bool(value) for value in (self.oidc_issuer, self.oidc_audience, self.oidc_jwks_url)}) > 1:
            raise ValueError("oidc_issuer, oidc_audience and oidc_jwks_url go together: set all or none")
        return self

    @property
    def asks_who_calls(self) -> bool:
        """Whether callers must show a token or a certificate."""
        return self.principals_file is not None or bool(self.oidc_issuer) or self.tls_client_ca is not None
