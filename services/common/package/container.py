"""The file around a package's three parts: magic, version, sizes, digest. Format: docs/package.md."""

import hashlib
import struct
from dataclasses import dataclass
from typing import NoReturn

from services.common.errors import InvalidArgumentError

VERSION = 2
"""Newest version of the format."""
FIRST_VERSION = 1
"""Oldest one; it has no odd codes, and a package without them is still written in it."""
MAX_PACKAGE_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 1 << 20
# Like PNG's: the first byte and the line ending show at once when something took the file for text.
_MAGIC = b"\x89GranQ\r\n"
# Magic, version, bytes of manifest, graph and codes; all little-endian.
_SIZES = struct.Struct("<8sIIQQ")
_DIGEST_BYTES = hashlib.sha256().digest_size
HEADER_BYTES = _SIZES.size + _DIGEST_BYTES


@dataclass(frozen=True)
class Parts:
    """The parts of a package as they lie in its file, in this order."""

    manifest: bytes | memoryview
    graph: bytes | memoryview
    codes: bytes | memoryview


def refuse(text: str) -> NoReturn:
    """Raise InvalidArgumentError for a package that cannot be used."""
    raise InvalidArgumentError(f"the device package {text}", reason="PACKAGE_INVALID", field="package")


def to_file(parts: Parts, version: int = VERSION) -> bytes:
    """Return the content of a package's file."""
    sizes = _SIZES.pack(_MAGIC, version, len(parts.manifest), len(parts.graph), len(parts.codes))
    return b"".join((sizes, _digest(sizes, parts), parts.manifest, parts.graph, parts.codes))


def from_file(data: bytes) -> Parts:
    """Return the parts of a package, which share the file's memory, after every byte was checked against the digest.

    Raises:
        InvalidArgumentError: This is no package, one of another version, or a damaged one.
    """
    if len(data) < HEADER_BYTES:
        refuse(f"is cut short: {len(data)} bytes do not even hold its header of {HEADER_BYTES}")
    magic, version, manifest_bytes, graph_bytes, codes_bytes = _SIZES.unpack_from(data)
    if magic != _MAGIC:
        refuse("is none: the file does not begin as packages do")
    if not FIRST_VERSION <= version <= VERSION:
        known = f"versions {FIRST_VERSION} to {VERSION}"
        refuse(f"has format version {version}, and this software reads {known}; update it")
    if manifest_bytes > MAX_MANIFEST_BYTES:
        refuse(f"declares a manifest of {manifest_bytes} bytes; at most {MAX_MANIFEST_BYTES} are read")
    total = HEADER_BYTES + manifest_bytes + graph_bytes + codes_bytes
    if total != len(data):
        state = "is cut short" if len(data) < total else "goes on behind its end"
        refuse(f"{state}: its header declares {total} bytes, the file has {len(data)}")
    view = memoryview(data)
    graph_at = HEADER_BYTES + manifest_bytes
    codes_at = graph_at + graph_bytes
    parts = Parts(view[HEADER_BYTES:graph_at], view[graph_at:codes_at], view[codes_at:])
    if _digest(view[: _SIZES.size], parts) != view[_SIZES.size : HEADER_BYTES]:
        refuse("is damaged: its content does not match its digest")
    return parts


def _digest(sizes: bytes | memoryview, parts: Parts) -> bytes:
    digest = hashlib.sha256(sizes)
    for part in (parts.manifest, parts.graph, parts.codes):
        digest.update(part)
    return digest.digest()
