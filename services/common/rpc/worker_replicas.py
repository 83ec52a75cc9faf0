"""All servers behind one name, such as the pods of a headless Service, taken for one worker.

A worker keeps its running jobs to itself, so calls must not be spread blindly: a job stays with the server that has it,
and a new one goes to the least busy.
"""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from google.protobuf.message import Message

from granq.v1 import jobs_pb2
from services.common.errors import WORKER_BUSY, GranqError, NotFoundError, ResourceExhaustedError
from services.common.rpc.worker_client import WorkerClient

_RESOLVE_SECONDS = 2.0
_LINGER_SECONDS = 60.0
_MAX_REMEMBERED = 4096
_ACTIVE = (jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING)


async def resolve(address: str) -> list[str]:
    """Return the addresses that a host:port means now; itself, where that is one or the name is not known."""
    host, _, port = address.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return [address]
    numbers = sorted({str(entry[4][0]) for entry in found})
    # A name for both versions of one machine's address is one server.
    numbers = [number for number in numbers if ":" not in number] or numbers
    return [address] if len(numbers) == 1 else [f"[{n}]:{port}" if ":" in n else f"{n}:{port}" for n in numbers]


class _Replica:
    """One server, and how many calls are on it: closing its client would cancel them."""

    def __init__(self, address: str, client: WorkerClient) -> None:
        self.address = address
        self.client = client
        self.users = 0
        self.gone_at = 0.0

    @contextmanager
    def used(self) -> Iterator[WorkerClient]:
        """Within the block, the client stays open."""
        self.users += 1
        try:
            yield self.client
        finally:
            self.users -= 1


class WorkerReplicas:
    """The servers of one worker; the calls are those of `WorkerClient`, and raise what they raise.

    Args:
        address: host:port; the host may mean several servers, and others after a while.
        connect: Returns the client of one of them, by its address.
        resolve: Returns the addresses that ``address`` means now.
    """

    def __init__(
        self,
        address: str,
        connect: Callable[[str], WorkerClient],
        resolve: Callable[[str], Awaitable[list[str]]] = resolve,
    ) -> None:
        self._address = address
        self._connect = connect
        self._resolve = resolve
        self._replicas: dict[str, _Replica] = {}
        self._gone: list[_Replica] = []
        self._resolved_at = float("-inf")
        self._owners: dict[str, str] = {}
        # Two jobs that begin at once must not both find the same server idle.
        self._choosing = asyncio.Lock()

    async def start(self, request: Message) -> jobs_pb2.Job:
        """Start a job at the least busy server that takes it, or attach to it, or resume it, where it is."""
        keyed: Any = request
        job_id: str = keyed.key.job_id
        async with self._choosing:
            owner = await self._find(job_id)
            replicas = [owner] if owner is not None else await self._by_load()
            for replica in replicas:
                try:
                    with replica.used() as client:
                        job = await client.start(request)
                except ResourceExhaustedError as error:
                    if error.reason != WORKER_BUSY or replica is replicas[-1]:
                        raise
                else:
                    self._remember(job_id, replica)
                    return job
        raise AssertionError("a name means one server at least")

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """Return a job as it is now."""
        with (await self._require(job_id)).used() as client:
            return await client.get(job_id)

    async def watch(self, job_id: str, run_id: str, sequence: int) -> AsyncGenerator[jobs_pb2.WatchJobResponse, None]:
        """Yield a job's events behind a number of a run."""
        with (await self._require(job_id)).used() as client:
            async with aclosing(client.watch(job_id, run_id, sequence)) as events:
                async for event in events:
                    yield event

    async def cancel(self, job_id: str, timeout_seconds: float) -> jobs_pb2.Job:
        """Ask a job to end and return it as it is then."""
        with (await self._require(job_id)).used() as client:
            return await client.cancel(job_id, timeout_seconds)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(replica.client.close() for replica in (*self._replicas.values(), *self._gone)))

    async def _current(self) -> list[_Replica]:
        """Return the servers that there are now."""
        now = time.monotonic()
        if now - self._resolved_at < _RESOLVE_SECONDS:
            return list(self._replicas.values())
        self._resolved_at = now
        addresses = await self._resolve(self._address)
        for address in set(self._replicas) - set(addresses):
            replica = self._replicas.pop(address)
            replica.gone_at = now
            self._gone.append(replica)
        for address in addresses:
            if address not in self._replicas:
                self._replicas[address] = _Replica(address, self._connect(address))
        await self._close_unused(now)
        return list(self._replicas.values())

    async def _close_unused(self, now: float) -> None:
        # Not at once: a call may be about to begin.
        ended = [replica for replica in self._gone if not replica.users and now - replica.gone_at > _LINGER_SECONDS]
        self._gone = [replica for replica in self._gone if replica not in ended]
        for replica in ended:
            await replica.client.close()

    def _remember(self, job_id: str, replica: _Replica) -> None:
        self._owners.pop(job_id, None)
        self._owners[job_id] = replica.address
        if len(self._owners) > _MAX_REMEMBERED:
            del self._owners[next(iter(self._owners))]

    async def _require(self, job_id: str) -> _Replica:
        found = await self._find(job_id)
        if found is None:
            raise NotFoundError(f"no server has the job {job_id!r}", reason="JOB_NOT_FOUND", field="job_id")
        return found

    async def _find(self, job_id: str) -> _Replica | None:
        """Return the server that has a job.

        Raises:
            UnavailableError: None that answers has it, and one does not answer.
        """
        replicas = await self._current()
        known = self._owners.get(job_id)
        for replica in replicas:
            if replica.address == known or len(replicas) == 1:
                return replica
        answers = await asyncio.gather(*(self._ask(replica, job_id) for replica in replicas))
        having = [(r, job) for r, job in zip(replicas, answers, strict=True) if isinstance(job, jobs_pb2.Job)]
        if having:
            # One that ended is known to all, from the store; where it runs comes first.
            replica, _ = min(having, key=lambda pair: pair[1].state not in _ACTIVE)
            self._remember(job_id, replica)
            return replica
        for error in answers:
            if isinstance(error, GranqError) and not isinstance(error, NotFoundError):
                raise error  # the job may be there
        return None

    async def _ask(self, replica: _Replica, job_id: str) -> jobs_pb2.Job | GranqError:
        with replica.used() as client:
            try:
                return await client.get(job_id)
            except GranqError as error:
                return error

    async def _by_load(self) -> list[_Replica]:
        """Return the servers, the least busy first."""
        replicas = await self._current()
        if len(replicas) == 1:
            return replicas
        counts = await asyncio.gather(*(replica.client.active_jobs() for replica in replicas))
        return [replica for _, replica in sorted(zip(counts, replicas, strict=True), key=lambda pair: pair[0])]
