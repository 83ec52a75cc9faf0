"""JSON Web Tokens, signed by a provider whose keys are fetched over HTTP."""

import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest

from services.common.errors import UnauthenticatedError, UnavailableError
from services.common.principal import Principal, Scope
from services.common.rpc import oidc
from services.common.rpc.oidc import OidcTokens
from services.common.security import SecuritySettings
from tests.support.identity_provider import AUDIENCE, ISSUER, Provider, identity_provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with identity_provider() as provider:
        yield provider


def tokens(provider: Provider, **settings: Any) -> OidcTokens:
    return OidcTokens(
        SecuritySettings(oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks_url=provider.url, **settings)
    )


def test_a_token_names_its_principal_and_scopes(provider: Provider) -> None:
    verified = tokens(provider).verify(provider.token(scope="openid read submit email"))
    assert verified == Principal("oidc:carol", frozenset({Scope.READ, Scope.SUBMIT}))


def test_claims_by_other_names(provider: Provider) -> None:
    checked = tokens(provider, oidc_name_claim="email", oidc_scope_claim="roles")
    verified = checked.verify(provider.token(email="c@example.org", roles=["admin", "cook"]))
    assert verified == Principal("oidc:c@example.org", frozenset({Scope.ADMIN}))


@pytest.mark.parametrize("claim", [None, 7, {}, "cook", []])
def test_a_token_without_scopes_may_do_nothing(provider: Provider, claim: object) -> None:
    assert tokens(provider).verify(provider.token(scope=claim)).scopes == frozenset()


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://other.example"},
        {"aud": "other"},
        {"aud": None},
        {"exp": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "x" * 256},
        {"nbf": 1e11},
        {"headers": {"kid": "unknown"}},
    ],
    ids=str,
)
def test_tokens_that_are_not_for_this_server(provider: Provider, claims: dict[str, Any]) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        tokens(provider).verify(provider.token(**claims))
    assert caught.value.reason == "CREDENTIALS_INVALID"


def test_an_expired_token_says_so(provider: Provider) -> None:
    with pytest.raises(UnauthenticatedError, match="expired") as caught:
        tokens(provider).verify(provider.token(exp=time.time() - 3600))
    assert caught.value.reason == "CREDENTIALS_EXPIRED"


def test_tokens_that_somebody_else_made(provider: Provider) -> None:
    checked = tokens(provider)
    claims = jwt.decode(provider.token(), options={"verify_signature": False})
    for forged in (
        jwt.encode(claims, "", algorithm="none", headers={"kid": "first"}),
        jwt.encode(claims, provider.keys() * 2, algorithm="HS256", headers={"kid": "first"}),
        provider.token()[:-8] + "AAAAAAAA",
        "a.b.c",
        "granq_no-jwt-at-all",
    ):
        with pytest.raises(UnauthenticatedError):
            checked.verify(forged)


def test_new_keys_are_found_and_made_up_ones_do_not_flood_the_provider(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = tokens(provider)
    checked.verify(provider.token())
    for number in range(20):
        with pytest.raises(UnauthenticatedError):
            checked.verify(provider.token(headers={"kid": f"made up {number}"}))
    assert provider.fetched <= 2
    provider.rotate("second")
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert checked.verify(provider.token()).name == "oidc:carol"


def test_a_provider_that_is_away_is_no_refusal(provider: Provider) -> None:
    provider.away = True
    with pytest.raises(UnavailableError) as caught:
        tokens(provider).verify(provider.token())
    assert caught.value.reason == "IDENTITY_PROVIDER_UNAVAILABLE"


def test_verified_tokens_are_remembered_until_they_expire(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, token = tokens(provider), provider.token(exp=time.time() + 20)
    assert checked.remembered(token) is None
    principal = checked.verify(token)
    assert checked.remembered(token) == principal
    later = time.time() + 21
    monkeypatch.setattr(time, "time", lambda: later)
    assert checked.remembered(token) is None


def test_few_tokens_are_remembered(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "_REMEMBERED", 2)
    checked = tokens(provider)
    made = [provider.token(sub=name) for name in ("a", "b", "c")]
    for token in made:
        checked.verify(token)
    assert [checked.remembered(token) is not None for token in made] == [False, True, True]
