"""Removes what nobody needs any more: old pipelines, records of jobs, and artifacts that nothing refers to.

An artifact is in use while a pipeline of the database names it, in its spec or its results, or while a reference of
the store does: the result or the checkpoint of a job, a timing cache, a recent upload. Everything else is removed once
it is older than a grace time, within which a running job tells what it stored. A job that stores the same content again
makes it young again, and no pipeline can be submitted in the moment of a removal.

Of several coordinators on one database one tidies up at a time. Coordinators of another database leave the store
alone: they do not know what its pipelines need.
"""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from prometheus_client import Counter

from services.common.artifacts import ArtifactStore
from services.common.errors import GranqError
from services.common.logs import get_logger
from services.coordinator.locks import ExecutorLocks
from services.coordinator.references import References, digests_in, seconds_ago
from services.coordinator.threads import Threads
from services.coordinator.transitions import State

REMOVED = Counter(
    "granq_retention_removed", "Pipelines, records of jobs and artifacts that retention removed.", ["kind"]
)
for _kind in ("pipeline", "record", "artifact"):
    REMOVED.labels(_kind)
FREED = Counter("granq_retention_freed_bytes", "Size of the blobs that retention removed.")
UPLOADS = "uploads/"
_OWNER = "retention/database"
_LOCK = "granq retention"
# As `new_pipeline_id` makes them; the ids of a pipeline's jobs begin so.
_PIPELINE = re.compile(r"(\d{8}-\d{6}-[0-9a-f]{10})-")
_BATCH = 50
_PIPELINES_AT_ONCE = 1000

log = get_logger(__name__)


@dataclass(frozen=True)
class RetentionPolicy:
    """How long things are kept, in seconds.

    Attributes:
        grace: Artifacts that nothing refers to, and records of jobs whose pipeline has succeeded or is gone.
        uploads: Uploads that no pipeline has named yet.
        jobs: Records of jobs that belong to no pipeline.
        pipelines: Pipelines, after their end; None for ever.
        interval: Time between two rounds.
    """

    grace: float
    uploads: float
    jobs: float
    pipelines: float | None
    interval: float


def note_upload(store: ArtifactStore, digest: str) -> None:
    """Have an artifact kept although nothing refers to it yet."""
    store.set_ref(f"{UPLOADS}{digest.removeprefix('sha256:')}", digest.encode())


def forget_jobs(store: ArtifactStore, pipeline_id: str) -> None:
    """Remove the records of a pipeline's jobs."""
    for name in store.list_refs(f"jobs/{pipeline_id}-"):
        store.delete_ref(name)


class Retention:
    """Tidies up from time to time, and soon after something was deleted.

    Args:
        references: What pipelines refer to.
        store: The artifact store.
        threads: Where blocking calls run; closed with this.
        locks: Hold the right to tidy up.
        delete: Deletes a pipeline.
        policy: How long things are kept.
    """

    def __init__(
        self,
        *,
        references: References,
        store: ArtifactStore,
        threads: Threads,
        locks: ExecutorLocks,
        delete: Callable[[str], Awaitable[None]],
        policy: RetentionPolicy,
    ) -> None:
        self._references = references
        self._store = store
        self._threads = threads
        self._lock = locks.lock(_LOCK)
        self._delete = delete
        self._policy = policy
        self._soon = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in the background."""
        self._task = asyncio.create_task(self._tidy_on())

    def soon(self) -> None:
        """Do not wait for the next round: something was deleted."""
        self._soon.set()

    async def _tidy_on(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._policy.interval):
                    await self._soon.wait()
            self._soon.clear()
            try:
                await self.tidy()
            except Exception:
                log.exception("tidying up failed; it is repeated")

    async def tidy(self) -> None:
        """Remove what is not needed, once."""
        if not await self._threads.call(self._lock.try_acquire):
            return  # another coordinator is at it
        try:
            await self._remove_pipelines()
            if await self._threads.call(self._owns_store):
                await self._threads.call(self._remove_refs)
                await self._remove_blobs()
        finally:
            await self._threads.call(self._lock.release)

    async def _remove_pipelines(self) -> None:
        if self._policy.pipelines is None:
            return
        limit = seconds_ago(self._policy.pipelines)
        for pipeline_id in await self._threads.call(self._references.ended_before, limit, _PIPELINES_AT_ONCE):
            try:
                await self._delete(pipeline_id)
                REMOVED.labels("pipeline").inc()
            except GranqError as error:  # deleted or retried this moment, or its records are out of reach now
                log.info("pipeline not removed", pipeline_id=pipeline_id, error=error.message)

    def _owns_store(self) -> bool:
        mine = self._references.identity().encode()
        if self._store.create_ref(_OWNER, mine):
            return True
        owner = self._store.get_ref(_OWNER)
        if owner != mine:
            log.error(
                "the artifact store is tidied up by the coordinators of another database, and not by this one; if that "
                "database is no more, remove this reference from the store",
                reference=_OWNER,
            )
        return owner == mine

    def _remove_refs(self) -> None:
        states, policy = self._references.states(), self._policy
        for name, age in self._store.ref_ages().items():
            folder, _, rest = name.partition("/")
            if folder == "jobs":
                limit = self._job_seconds(rest, states)
            elif folder == "leases":
                limit = policy.grace  # the holder would have written to it
            elif name.startswith(UPLOADS):
                limit = policy.uploads
            else:
                continue
            if limit is not None and age > limit:
                self._store.delete_ref(name)
                REMOVED.labels("record").inc()

    def _job_seconds(self, job: str, states: dict[str, int]) -> float | None:
        """Return how long the records of a job are kept; None for as long as its pipeline may need them."""
        found = _PIPELINE.match(job)
        if found is None:
            return self._policy.jobs
        state = states.get(found[1])
        return self._policy.grace if state in (None, State.PIPELINE_STATE_SUCCEEDED) else None

    async def _remove_blobs(self) -> None:
        began = seconds_ago(60)  # clocks of coordinators may differ a little
        grace = self._policy.grace
        old = {digest for digest, age in (await self._threads.call(self._store.blob_ages)).items() if age > grace}
        if old:
            # References of the store first: what moves from there to the database meanwhile is seen in the latter.
            old -= await self._threads.call(self._referred)
            old -= await self._threads.call(self._references.digests)
        unused, freed = sorted(old), 0
        for first in range(0, len(unused), _BATCH):
            batch = unused[first : first + _BATCH]
            freed += await self._threads.call(self._references.unless_named, batch, began, self._remove_blob)
        if unused:
            log.info("removed artifacts that nothing refers to", artifacts=len(unused), bytes=freed)

    def _referred(self) -> set[str]:
        found: set[str] = set()
        for name in self._store.list_refs():
            found |= digests_in(self._store.get_ref(name) or b"")
        return found

    def _remove_blob(self, digest: str) -> int | None:
        size = self._store.delete_blob(digest, self._policy.grace)
        if size is not None:
            REMOVED.labels("artifact").inc()
            FREED.inc(size)
        return size

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._threads.close()
