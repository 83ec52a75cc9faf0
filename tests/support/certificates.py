"""Certificates and tokens, made for one test."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import trustme

TOKENS = {"alice": "granq_alice-0123456789", "bob": "granq_bob-0123456789", "root": "granq_root-0123456789"}


class Authority:
    """A certificate authority with its files in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.path = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.path))

    @property
    def pem(self) -> bytes:
        return self.path.read_bytes()

    def issue(self, *names: str, file: str = "server") -> tuple[Path, Path]:
        """Write a certificate for names and its key, over earlier files of the same name; return both paths."""
        issued = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")))
        certificate, key = self._folder / f"{file}.crt", self._folder / f"{file}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        return certificate, key


def credential(principal: str, scopes: Iterable[str], token: str = "", **fields: str) -> str:
    """Return a [[credential]] of a principals file."""
    lines = ["[[credential]]", f'principal = "{principal}"', f"scopes = {list(scopes)}"]
    if token:
        lines.append(f'token_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"')
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in fields.items())]) + "\n"


def people() -> str:
    """Return a principals file with two users and an administrator, who have the tokens of `TOKENS`."""
    users = [credential(name, ["read", "submit"], TOKENS[name]) for name in ("alice", "bob")]
    return "\n".join([*users, credential("root", ["admin"], TOKENS["root"])])


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call with a token."""
    return (("authorization", f"Bearer {token}"),)
