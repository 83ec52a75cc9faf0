"""Compiled CPU kernels, which hatch_build.py puts beside their source, loaded through ctypes."""

import ctypes
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

Signature = tuple[list[Any], Any]
"""Types of a function's arguments and of its result."""

# Part of every source.
_HEADER: Final = Path(__file__).with_name("values.h")


def load(source: Path, signatures: Mapping[str, Signature]) -> ctypes.CDLL | None:
    """Return the library of a source, or None where the installation has none or this machine cannot load it.

    Import torch first: it loads the OpenMP library whose symbols the kernels need.

    Args:
        source: A .cpp file. Its library is named by its content, so that one of other source is never loaded.
        signatures: Of the functions, by name.
    """
    digest = hashlib.sha256(_HEADER.read_bytes() + source.read_bytes()).hexdigest()[:12]
    try:
        found = ctypes.CDLL(str(source.with_name(f"_{source.stem}_{digest}.so")))
    except OSError:
        return None
    for name, (arguments, result) in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found
