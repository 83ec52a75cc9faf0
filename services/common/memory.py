"""How a server's memory is kept."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # glibc's names for them: M_…
_KEPT_BYTES = 32 * 1024**2
_ARENAS = 2


def keep_freed_memory() -> None:
    """Have this process keep up to 32 MiB of freed memory for what it allocates next; nothing happens without glibc.

    Else each chunk of a transfer comes page by page from the kernel, which takes as long as hashing it. All threads
    share two arenas, since each arena keeps so much; by default there may be eight for every core.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_ARENA_MAX, _ARENAS)
