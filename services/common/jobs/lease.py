"""The right to run a job: of all processes that share a store, at most one has it at a time.

A lease is a reference `leases/<job>/<number>`. Whoever wants it creates the next number, which succeeds for one alone,
and then writes to it again and again. One that was not written to for a while is free, and so is one whose process is
known to be gone. Time is measured by each process for itself, between two looks, so clocks need not agree.

A process that could not write for too long, because it was stopped or the store away, works no further until it has
seen that the lease is still its own. If it is not, the process ends at once: another one is at work.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from services.common.artifacts import ArtifactStore
from services.common.errors import GranqError
from services.common.logs import get_logger

_LOOK_SECONDS = 0.5
log = get_logger(__name__)


class LeaseLostError(Exception):
    """Another process has the lease."""


class _Holder(BaseModel):
    """Who has a lease; `beat` changes with each write."""

    owner: str
    machine: str
    pid: int
    started: str
    beat: int = 0


def _started(pid: int) -> str | None:
    """Return what tells a process from a later one of the same id; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """Return what two processes have in common that see each other's ids; "" where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _folder(job_id: str) -> str:
    return f"leases/{job_id}/"


def _read(store: ArtifactStore, name: str) -> _Holder | None:
    data = store.get_ref(name)
    try:
        return None if data is None else _Holder.model_validate_json(data)
    except ValidationError:
        return None  # not written by this code; as good as none


def release(store: ArtifactStore, job_id: str, owner: str) -> None:
    """Give a lease up on behalf of a process that has ended; nothing happens where it is another owner's."""
    for name in store.list_refs(_folder(job_id)):
        holder = _read(store, name)
        if holder is not None and holder.owner == owner:
            store.delete_ref(name)


class Lease:
    """The lease of one job, for one process. Methods block on the store.

    Args:
        store: The store that all workers share.
        job_id: The job.
        owner: Name of this run of it, unlike any other.
        seconds: Time without a write after which a lease is free.
    """

    def __init__(self, store: ArtifactStore, job_id: str, owner: str, seconds: float) -> None:
        self._store = store
        self._folder = _folder(job_id)
        self._seconds = seconds
        self._self = _Holder(owner=owner, machine=_machine(), pid=os.getpid(), started=_started(os.getpid()) or "")
        self._number = 0
        self._written = 0.0
        self._lock = threading.Lock()

    def _numbers(self) -> list[int]:
        return sorted(int(name.rpartition("/")[2]) for name in self._store.list_refs(self._folder))

    def _bytes(self) -> bytes:
        return self._self.model_dump_json().encode()

    def take(self, wait: Callable[[], None]) -> bool:
        """Return once the lease is this process's.

        Args:
            wait: Called again and again while another process has it; what it raises ends the waiting.

        Returns:
            Whether another process had it meanwhile, and may have finished the job.
        """
        seen: tuple[int, _Holder | None] | None = None
        since, waited = time.monotonic(), False
        while True:
            newest = max(self._numbers(), default=0)
            holder = _read(self._store, f"{self._folder}{newest}") if newest else None
            if (newest, holder) != seen:
                seen, since = (newest, holder), time.monotonic()
            if holder is None or self._is_free(holder, time.monotonic() - since):
                if self._create(newest + 1):
                    return waited
                continue
            waited = True
            wait()
            time.sleep(min(_LOOK_SECONDS, self._seconds / 4))

    def _is_free(self, holder: _Holder, unchanged_seconds: float) -> bool:
        near = holder.machine != "" and holder.machine == self._self.machine
        return (near and _started(holder.pid) != holder.started) or unchanged_seconds >= self._seconds

    def _create(self, number: int) -> bool:
        began = time.monotonic()
        if not self._store.create_ref(f"{self._folder}{number}", self._bytes()):
            return False
        self._number, self._written = number, began
        for older in self._numbers():
            if older < number:
                self._store.delete_ref(f"{self._folder}{older}")
        return True

    def revoke(self) -> None:
        """End the run of the process that has the lease now, which it notices at its next write."""
        if self._create(max(self._numbers(), default=0) + 1):
            self._store.delete_ref(f"{self._folder}{self._number}")

    def renew(self) -> None:
        """Write to the lease.

        Raises:
            LeaseLostError: Another process has it.
        """
        with self._lock:
            name, began = f"{self._folder}{self._number}", time.monotonic()
            held = _read(self._store, name)
            if held is None or held.owner != self._self.owner or max(self._numbers(), default=0) > self._number:
                raise LeaseLostError(name)
            self._self.beat += 1
            self._store.set_ref(name, self._bytes())
            self._written = began

    def check(self) -> None:
        """Return at once while the lease is surely this process's; else find out, and wait for the store if need be.

        Raises:
            LeaseLostError: Another process has it.
        """
        while time.monotonic() - self._written > 0.75 * self._seconds:
            try:
                self.renew()
            except GranqError:
                time.sleep(_LOOK_SECONDS)

    def keep(self, on_loss: Callable[[], None]) -> None:
        """Renew the lease from now on, in a thread; `on_loss` is called there when another process has it."""

        def renew_on() -> None:
            told = False
            while True:
                time.sleep(self._seconds / 4)
                try:
                    self.renew()
                    told = False
                except LeaseLostError:
                    on_loss()
                    return
                except (GranqError, MemoryError) as error:  # also while a file is read under a limit of memory
                    if not told:
                        log.warning("the lease of the job cannot be renewed; trying again", error=str(error))
                    told = True

        threading.Thread(target=renew_on, daemon=True, name="lease").start()


def release_quietly(store: ArtifactStore, job_id: str, owner: str) -> None:
    """As `release`, for those who cannot help it when the store is away: the lease then ends by itself."""
    with suppress(GranqError):
        release(store, job_id, owner)
