"""Uploads and downloads of one large file through a coordinator on loopback, and the limits that they have."""

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

import granq
from tests.support.servers import ServerProcess

_BLOCK = 1024 * 1024


def write_file(path: Path, megabytes: int) -> None:
    """Write a file of which no two blocks are alike."""
    block = bytearray(os.urandom(_BLOCK))
    with path.open("wb") as file:
        for number in range(megabytes):
            block[:8] = number.to_bytes(8, "little")
            file.write(block)


class Memory:
    """Watches how much resident memory processes have beyond what they began with."""

    def __init__(self, *pids: int) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._before = [process.memory_info().rss for process in self._processes]
        self.growth = [0] * len(pids)

    def look(self) -> None:
        """Take a sample."""
        for index, process in enumerate(self._processes):
            self.growth[index] = max(self.growth[index], process.memory_info().rss - self._before[index])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take samples within the block."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _cpu(*pids: int) -> float:
    return float(sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids))


def _sha256(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)
        os.fsync(writer.fileno())


def _warm(path: Path, megabytes: int) -> None:
    """Write a file and remove it, so that the system has memory at hand for the next file of its size.

    A virtual machine may have to ask its host for each page that it has not used of late.
    """
    write_file(path, megabytes)
    path.unlink()


def measure(folder: Path | None, megabytes: int, rounds: int, add: Callable[..., None]) -> None:
    """Give the table's rows to ``add``."""
    samples: dict[str, list[tuple[float, float]]] = {}
    gigabytes, growth = megabytes * _BLOCK / 1e9, [0, 0]

    def timed(what: str, call: Callable[[], object], *pids: int) -> None:
        _warm(target, megabytes)
        cpu, began = _cpu(*pids), time.perf_counter()
        call()
        samples.setdefault(what, []).append((time.perf_counter() - began, _cpu(*pids) - cpu))

    with TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        source, target = place / "source", place / "target"
        write_file(source, megabytes)
        digest = granq_digest(source)
        for _ in range(rounds):
            # A server of its own for each round: it would not take what it holds.
            with TemporaryDirectory(dir=place) as home:
                server = ServerProcess("coordinator", Path(home), database_url=f"sqlite:///{home}/coordinator.sqlite")
                server.start()
                try:
                    with granq.Client(server.address) as client:
                        client.upload(b"first")  # what a connection and a first call load is no growth of a transfer
                        memory = Memory(os.getpid(), server.pid)
                        with memory.watched():
                            timed("upload", lambda: client.upload(source), os.getpid(), server.pid)
                            timed("download", lambda: client.download(digest, target), os.getpid(), server.pid)
                        growth = [max(pair) for pair in zip(growth, memory.growth, strict=True)]
                finally:
                    server.stop()
            target.unlink()
            timed("sha256 of the file, one thread", lambda: _sha256(source), os.getpid())
            timed("copy of the file, with fsync", lambda: _copy(source, target), os.getpid())
            target.unlink()
    for what, found in samples.items():
        walls, cpus = zip(*found, strict=True)
        rate = gigabytes / statistics.median(walls)
        memory_cell = " / ".join(f"{value / 1e6:.0f}" for value in growth) if what in ("upload", "download") else ""
        add(what, f"{rate:.2f}", f"{gigabytes / min(walls):.2f}", f"{min(cpus) / gigabytes:.2f}", memory_cell)


def granq_digest(path: Path) -> str:
    """Return a file's digest as artifacts name it."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


COLUMNS = ("what", "GB/s, median", "GB/s, best", "CPU s per GB", "memory growth MB, client / server")
