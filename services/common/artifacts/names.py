"""Paths of blobs and references in a store."""

import re

from services.common.errors import InvalidArgumentError, NotFoundError

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
# In no name, so that the file of "a" and the folder of "a/b" never are the same path.
_REF_SUFFIX = "@ref"


def blob_path(digest: str) -> str:
    """Return the path of a blob, or raise InvalidArgumentError."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise InvalidArgumentError(f'a digest is "sha256:" and 64 hexadecimal digits, got {digest!r}', field="digest")
    return f"blobs/sha256/{match[1][:2]}/{match[1]}"


def blob_digest(path: str) -> str:
    """Return the digest of the blob at a path."""
    return f"sha256:{path[-64:]}"


def not_found(digest: str) -> NotFoundError:
    """Return the error for a blob that is not there."""
    return NotFoundError(f"the store does not hold {digest}", reason="ARTIFACT_NOT_FOUND")


def ref_path(name: str) -> str:
    """Return the path of a reference, or raise InvalidArgumentError."""
    if _REF.fullmatch(name) is None:
        raise InvalidArgumentError(f"{name!r} is no name of a reference")
    return f"refs/{name}{_REF_SUFFIX}"


def is_ref(path: str) -> bool:
    """Return whether a path is that of a reference."""
    return path.endswith(_REF_SUFFIX)


def ref_name(path: str) -> str:
    """Return the name of the reference at a path."""
    return path[len("refs/") : -len(_REF_SUFFIX)]
