"""The Python client and the command against a server that has TLS and asks who calls."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import granq
from granq.cli.exits import Exit
from services.common.rpc.principals import Principals
from tests.support.certificates import TOKENS, Authority, people
from tests.support.coordinator import CoordinatorProcess
from tests.support.servers import ServerProcess

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[ServerProcess, Authority]]:
    authority = Authority(tmp_path)
    certificate, key = authority.issue()
    (tmp_path / "principals.toml").write_text(people())
    server = CoordinatorProcess(
        tmp_path,
        "127.0.0.1:1",
        host="0.0.0.0",
        tls_certificate=str(certificate),
        tls_key=str(key),
        principals_file=str(tmp_path / "principals.toml"),
    ).start()
    yield server, authority
    assert server.stop() == 0


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    whole = {key: value for key, value in os.environ.items() if not key.startswith("GRANQ_")} | environment
    return subprocess.run(
        [sys.executable, "-m", "granq.cli", *arguments], env=whole, capture_output=True, text=True, timeout=60
    )


def test_the_client_shows_what_it_is_given(served: tuple[ServerProcess, Authority], tmp_path: Path) -> None:
    server, authority = served
    token_file = tmp_path / "token"
    token_file.write_text(TOKENS["alice"] + "\n")
    with granq.Client(server.address, ca=authority.path, token_file=token_file) as client:
        artifact = client.upload(b"weights")
        client.download(artifact, tmp_path / "weights")
        assert list(client.list()) == []
        # A renewed token is shown from the next call on.
        token_file.write_text(TOKENS["bob"])
        with pytest.raises(granq.GranqClientError) as caught:
            client.stat(artifact)
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
    wrong: list[tuple[dict[str, Any], grpc.StatusCode]] = [
        ({"ca": authority.path}, grpc.StatusCode.UNAUTHENTICATED),
        ({"ca": authority.path, "token": "granq_wrong"}, grpc.StatusCode.UNAUTHENTICATED),
        ({"tls": True, "token": TOKENS["alice"]}, grpc.StatusCode.UNAVAILABLE),
    ]
    for options, code in wrong:
        with granq.Client(server.address, **options) as client, pytest.raises(granq.GranqClientError) as caught:
            client.stat(artifact)
        assert caught.value.code is code


def test_the_command_takes_options_and_environment(served: tuple[ServerProcess, Authority], tmp_path: Path) -> None:
    server, authority = served
    (tmp_path / "token").write_text(TOKENS["alice"])
    listing = ("pipelines", "list", "--address", server.address)
    shown = command("--ca", str(authority.path), "--token-file", str(tmp_path / "token"), *listing)
    assert shown.returncode == Exit.OK, shown.stderr
    shown = command(*listing, GRANQ_CA=str(authority.path), GRANQ_TOKEN=TOKENS["bob"])
    assert shown.returncode == Exit.OK, shown.stderr
    refused = command(*listing, GRANQ_CA=str(authority.path))
    assert refused.returncode == Exit.REFUSED
    assert "CREDENTIALS_MISSING" in refused.stderr


@pytest.mark.parametrize(
    "options", [{"token": "t"}, {"token": "a", "token_file": "b"}, {"certificate": "c"}], ids=["plain", "two", "half"]
)
def test_what_does_not_go_together(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"plain text|either|go together"):
        granq.Client("example.org:50050", **options)  # type: ignore[arg-type]


def test_a_new_token_fits_its_line(tmp_path: Path) -> None:
    made = command("token", "new", "alice", "--scope", "read")
    assert made.returncode == Exit.OK, made.stderr
    path = tmp_path / "principals.toml"
    path.write_text(made.stdout)
    principal = Principals(path).of_token(made.stderr.strip())
    assert principal is not None
    assert (principal.name, set(principal.scopes)) == ("alice", {"read"})
    assert made.stderr.strip() not in made.stdout
    assert set(tomllib.loads(command("token", "new", "bob").stdout)["credential"][0]["scopes"]) == {"read", "submit"}
    assert command("token", "new", "oidc:bob").returncode == Exit.USAGE
