"""The compiled CPU kernels, for tests of what they compute."""

import ctypes
from functools import _lru_cache_wrapper
from pathlib import Path

import pytest

import hatch_build


def compile_or_skip(library: "_lru_cache_wrapper[ctypes.CDLL | None]") -> None:
    """Compile the kernels where they are missing, and skip where ``library`` then still loads none."""
    hatch_build.compile_kernels(Path(hatch_build.__file__).parent)
    library.cache_clear()
    if library() is None:
        pytest.skip("no C++ compiler, or a processor that the kernels do not serve")
