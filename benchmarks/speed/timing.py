"""Time and memory of variants of one computation, taken in turn, and the machine's limits beside them."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them: M_…
Clock = Callable[[], float]


def clock_of(name: str, device: torch.device) -> Clock:
    """Return a clock in seconds: "wall", or "cpu", the processor time of the calling thread.

    On a machine that is shared, the second leaves out the time in which others had the core. It only says something
    where one thread does all the work.

    Raises:
        ValueError: "cpu" where other threads or a GPU compute too.
    """
    if name == "wall":
        return time.perf_counter
    if device.type != "cpu" or torch.get_num_threads() != 1:
        raise ValueError("--clock cpu counts the calling thread alone; it takes --threads 1 and the CPU")
    return time.thread_time


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    variants: Mapping[str, Callable[[], object]], runs: int, clock: Clock, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of one call of each variant.

    Each run calls all of them once, so that a slow phase of the machine meets all alike. One call of each before the
    first run is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(runs + 1):
        for name, call in variants.items():
            synchronize(device)
            begin = clock()
            call()
            synchronize(device)
            if number:
                taken[name].append(clock() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for what is allocated next, as in processes of jobs (services/common/jobs).

    Else each large tensor comes page by page from the kernel.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, size in ((_MMAP_THRESHOLD, 256 * 2**20), (_TRIM_THRESHOLD, 512 * 2**20)):
            library.mallopt(parameter, size)


def copy_seconds(x: Tensor) -> Callable[[], object]:
    """Return the floor of an elementwise operation on ``x``: read it once, write as much once."""
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return by how much the peak of memory in use during ``call`` exceeds what was in use before it.

    On the CPU that is this process's resident set, whose peak Linux lets a process reset.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
