"""Runs one parser on many inputs, in a process of its own: native code may crash, hang, or fill the memory."""

import faulthandler
import random
import resource
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.fuzz.parsers import Parser, parsers
from services.common.errors import GranqError, is_out_of_memory

HANG_SECONDS = 1.0
MEMORY_BYTES = 1 << 30
_DEADLOCK_SECONDS = 120


@dataclass
class Findings:
    """What happened.

    Attributes:
        inputs: Inputs tried.
        accepted: Inputs that were read without complaint.
        refused: Inputs that were refused, by reason.
        no_memory: Of those, how many for an allocation beyond 1 GiB.
        slowest: Longest processor time of one input, in seconds.
        defects: Any other outcome, with the input's number: errors that are not ours, and what took over a second.
    """

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    no_memory: int = 0
    slowest: float = 0.0
    defects: list[str] = field(default_factory=list)


def make_input(parser: Parser, name: str, seed: int, number: int) -> bytes:
    """Return an input by its number; the same one each time."""
    rng = random.Random(f"{name}/{seed}/{number}")  # noqa: S311 - repeatable, not secret
    return parser.mutate(rng.choice(parser.seeds), rng)


def run(
    parser: Parser, name: str, seed: int, count: int, seconds: float = float("inf"), last: Path | None = None
) -> Findings:
    """Try inputs in the order of their numbers.

    Args:
        parser: What reads them.
        name: Its name, on which the inputs depend.
        seed: As does this.
        count: Inputs to try.
        seconds: Time after which no further one is begun.
        last: File that always holds the input that is being read, for when this process ends with it.
    """
    warnings.simplefilter("ignore")
    found = Findings()
    end = time.monotonic() + seconds
    while found.inputs < count and time.monotonic() < end:
        data = make_input(parser, name, seed, found.inputs)
        if last is not None:
            last.write_bytes(data)
        began = time.thread_time()
        try:
            parser.parse(data)
            found.accepted += 1
        except parser.errors as error:
            found.refused[error.reason if isinstance(error, GranqError) else type(error).__name__] += 1
            found.no_memory += is_out_of_memory(error)
        except Exception as error:
            if is_out_of_memory(error):
                found.no_memory += 1
                found.refused["READ_MEMORY"] += 1
            else:
                found.defects.append(f"input {found.inputs}: {type(error).__name__}: {str(error)[:200]}")
        taken = time.thread_time() - began
        found.slowest = max(found.slowest, taken)
        if taken > HANG_SECONDS:
            found.defects.append(f"input {found.inputs}: took {taken:.1f} s")
        found.inputs += 1
        if last is not None and found.inputs % 64 == 0:
            faulthandler.dump_traceback_later(_DEADLOCK_SECONDS, exit=True)
    faulthandler.cancel_dump_traceback_later()
    return found


def work(name: str, folder: str, seed: int, count: int, seconds: float) -> Findings:
    """Run a parser by its name, with files below a folder, in a process that was spawned for it."""
    torch.set_num_threads(1)
    parser = dict(parsers(Path(folder)))[name]()
    _limit_memory()
    return run(parser, name, seed, count, seconds, Path(folder, "last"))


def _limit_memory() -> None:
    """Let allocations of this process fail beyond 1 GiB more than it has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
