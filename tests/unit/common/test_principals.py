"""The file of principals: who has which token, changes while it is used, and files that are refused."""

from pathlib import Path

import pytest

from services.common.errors import FailedPreconditionError, UnauthenticatedError
from services.common.principal import Principal, Scope
from services.common.rpc.principals import Principals
from tests.support.certificates import credential

TOKEN = "granq_secret-0123456789"


def written(folder: Path, text: str) -> Path:
    path = folder / "principals.toml"
    path.write_text(text)
    return path


def test_tokens_and_certificates_lead_to_principals(tmp_path: Path) -> None:
    text = credential("alice", ["read"], TOKEN) + credential("worker", ["service"], certificate='"granq-quantizer"')
    principals = Principals(written(tmp_path, text))
    assert principals.of_token(TOKEN) == Principal("alice", frozenset({Scope.READ}))
    assert principals.of_token(TOKEN + "x") is None
    assert principals.of_certificate(["other", "granq-quantizer"]) == Principal("worker", frozenset({Scope.SERVICE}))
    assert principals.of_certificate(["other"]) is None
    # Neither kind of proof passes for the other.
    assert principals.of_token("granq-quantizer") is None


def test_a_principal_may_have_two_tokens_while_they_are_changed(tmp_path: Path) -> None:
    text = credential("ci", ["submit"], "old-token-0123456789") + credential("ci", ["submit"], TOKEN)
    principals = Principals(written(tmp_path, text))
    assert principals.of_token("old-token-0123456789") == principals.of_token(TOKEN)


@pytest.mark.parametrize("expires", ["2020-01-01", "2020-01-01T00:00:00", "2020-01-01T00:00:00Z"])
def test_expired_credentials_are_told_apart(tmp_path: Path, expires: str) -> None:
    path = written(tmp_path, credential("alice", ["read"], TOKEN, expires=expires))
    with pytest.raises(UnauthenticatedError, match="expired") as caught:
        Principals(path).of_token(TOKEN)
    assert caught.value.reason == "CREDENTIALS_EXPIRED"
    later = written(tmp_path, credential("alice", ["read"], TOKEN, expires=expires.replace("2020", "2920")))
    assert Principals(later).of_token(TOKEN) is not None


def test_changes_are_taken_over_and_damage_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, credential("alice", ["read"], TOKEN))
    principals = Principals(path)
    assert principals.of_token(TOKEN) is not None
    path.write_text("[[credential")
    assert principals.of_token(TOKEN) is not None, "a damaged file must not lock everybody out"
    path.write_text(credential("alice", ["read"], "granq_another-0123456789"))
    assert principals.of_token(TOKEN) is None
    assert principals.of_token("granq_another-0123456789") is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[credential", "cannot be read"),
        (credential("alice", ["read"]), "either token_sha256 or certificate"),
        (credential("alice", ["read"], TOKEN, certificate='"x"'), "either token_sha256 or certificate"),
        (credential("alice", [], TOKEN), "credential.0.scopes"),
        (credential("alice", ["write"], TOKEN), "credential.0.scopes.0"),
        (credential("oidc:alice", ["read"], TOKEN), "credential.0.principal"),
        (credential("alice", ["read"], token_sha256=f'"{TOKEN}"'), "credential.0.token_sha256"),
        (credential("alice", ["read"], TOKEN, colour='"red"'), "credential.0.colour"),
        (credential("alice", ["read"], TOKEN) * 2, "twice"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        Principals(written(tmp_path, text))
    assert says in caught.value.message
    assert TOKEN not in caught.value.message, "a token that stands in the file by mistake must not get into the log"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="cannot be read"):
        Principals(tmp_path / "missing.toml")
