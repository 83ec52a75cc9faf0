"""JSON Web Tokens of an OpenID Connect provider."""

import hashlib
import threading
import time
from collections import OrderedDict
from typing import Any

from services.common.errors import FailedPreconditionError, UnauthenticatedError, UnavailableError
from services.common.principal import Principal, Scope
from services.common.security import SecuritySettings

# Only those with a public key: a shared secret could be used to make tokens, and "none" signs nothing.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_LEEWAY_SECONDS = 30
_FETCH_SECONDS = 5
_REMEMBERED = 1024
_REMEMBER_SECONDS = 60.0
_MAX_NAME = 255


class OidcTokens:
    """Checks tokens against the provider's keys, which are fetched when they are needed and kept for five minutes.

    Args:
        settings: Issuer, audience, URL of the keys, and names of the claims.

    Raises:
        FailedPreconditionError: PyJWT is not installed.
    """

    def __init__(self, settings: SecuritySettings) -> None:
        try:
            import jwt
        except ModuleNotFoundError as error:
            raise FailedPreconditionError(
                "oidc_issuer needs PyJWT: pip install 'granq-pipeline[oidc]'", reason="EXTRA_MISSING"
            ) from error
        self._jwt = jwt
        self._settings = settings
        self._keys = jwt.PyJWKClient(settings.oidc_jwks_url, timeout=_FETCH_SECONDS)
        self._lock = threading.Lock()
        self._verified: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    def remembered(self, token: str) -> Principal | None:
        """Return who has a token that was verified within the last minute, or None; quick, unlike `verify`."""
        key = hashlib.sha256(token.encode()).digest()
        principal, until = self._verified.get(key, (None, 0.0))
        return principal if time.time() < until else None

    def verify(self, token: str) -> Principal:
        """Return who has a token; blocks while the keys are fetched.

        Raises:
            UnauthenticatedError: It is not the provider's, not for this audience, or has expired.
            UnavailableError: The keys cannot be fetched.
        """
        settings, jwt = self._settings, self._jwt
        try:
            claims = jwt.decode(
                token,
                self._keys.get_signing_key_from_jwt(token),
                algorithms=ALGORITHMS,
                audience=settings.oidc_audience,
                issuer=settings.oidc_issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", settings.oidc_name_claim]},
            )
        except jwt.PyJWKClientConnectionError as error:
            raise UnavailableError(
                "the identity provider's keys cannot be fetched now; try again", reason="IDENTITY_PROVIDER_UNAVAILABLE"
            ) from error
        except jwt.ExpiredSignatureError as error:
            raise UnauthenticatedError("the token has expired; get a new one", reason="CREDENTIALS_EXPIRED") from error
        except (jwt.PyJWTError, ValueError) as error:
            raise UnauthenticatedError("the token is not valid here", reason="CREDENTIALS_INVALID") from error
        name = claims[settings.oidc_name_claim]
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
            raise UnauthenticatedError("the token's name claim is no name", reason="CREDENTIALS_INVALID")
        # The prefix keeps a provider's users from taking the name of a principal of the file.
        principal = Principal(f"oidc:{name}", _scopes(claims.get(settings.oidc_scope_claim)))
        self._remember(token, principal, float(claims["exp"]))
        return principal

    def _remember(self, token: str, principal: Principal, expires: float) -> None:
        key = hashlib.sha256(token.encode()).digest()
        with self._lock:
            self._verified[key] = (principal, min(expires, time.time() + _REMEMBER_SECONDS))
            self._verified.move_to_end(key)
            while len(self._verified) > _REMEMBERED:
                self._verified.popitem(last=False)


def _scopes(claim: Any) -> frozenset[Scope]:
    """Return the known scopes of a claim; others are those of other applications."""
    names = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return frozenset(scope for scope in Scope if scope.value in names)
