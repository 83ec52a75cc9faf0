"""The file that says who may call: hashed tokens and names of certificates, with their scopes."""

import hashlib
import time
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from services.common.errors import FailedPreconditionError, UnauthenticatedError
from services.common.principal import Principal, Scope
from services.common.watched import Watched

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$")]


class Credential(BaseModel):
    """One [[credential]] of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    principal: _Name
    scopes: frozenset[Scope] = Field(min_length=1)
    token_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    certificate: Annotated[str, StringConstraints(min_length=1)] | None = None
    expires: datetime | None = None

    @field_validator("expires", mode="before")
    @classmethod
    def _at_midnight(cls, value: object) -> object:
        # TOML knows dates without a time, and times without a zone; both are taken as UTC.
        if isinstance(value, date) and not isinstance(value, datetime):
            return datetime(value.year, value.month, value.day, tzinfo=UTC)
        if isinstance(value, datetime) and value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        return value

    @model_validator(mode="after")
    def _one_proof(self) -> Self:
        if (self.token_sha256 is None) == (self.certificate is None):
            raise ValueError("give either token_sha256 or certificate")
        return self


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    credential: list[Credential] = Field(default_factory=list)


class Principals:
    """Credentials of a file, looked up by what a caller shows; the file may change at any time.

    Args:
        path: The file.

    Raises:
        FailedPreconditionError: It cannot be read, or is not as docs/security.md describes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = Watched([path], self._load)

    def of_token(self, token: str) -> Principal | None:
        """Return who has a token, or None when no line of the file has it.

        Raises:
            UnauthenticatedError: It has expired.
        """
        return _principal(self._known.get().get(_token_key(hashlib.sha256(token.encode()).hexdigest())))

    def of_certificate(self, names: list[str]) -> Principal | None:
        """Return who has a certificate with one of these names, or None; raises as `of_token` does."""
        known = self._known.get()
        return next((_principal(known[key]) for key in map(_certificate_key, names) if key in known), None)

    def _load(self) -> dict[str, Credential]:
        try:
            document = _Document.model_validate(tomllib.loads(self._path.read_text("utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FailedPreconditionError(f"principals_file {self._path} cannot be read: {error}") from error
        except ValidationError as error:
            # Not the error's own text: it repeats the input, in which a token may stand by mistake.
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise FailedPreconditionError(f"principals_file {self._path}, {place}: {first['msg']}") from error
        found: dict[str, Credential] = {}
        for credential in document.credential:
            key = _token_key(credential.token_sha256) if credential.token_sha256 else ""
            key = key or _certificate_key(str(credential.certificate))
            if key in found:
                raise FailedPreconditionError(
                    f"principals_file {self._path} has a credential of {credential.principal!r} twice"
                )
            found[key] = credential
        return found


def _token_key(digest: str) -> str:
    return f"token:{digest}"


def _certificate_key(name: str) -> str:
    return f"certificate:{name}"


def _principal(credential: Credential | None) -> Principal | None:
    if credential is None:
        return None
    if credential.expires is not None and credential.expires.timestamp() <= time.time():
        raise UnauthenticatedError("the credentials have expired; ask for new ones", reason="CREDENTIALS_EXPIRED")
    return Principal(credential.principal, credential.scopes)
