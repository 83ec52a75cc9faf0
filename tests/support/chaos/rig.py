"""The servers of a chaos run: scripted workers, and real ones, each set with coordinators on one PostgreSQL."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psycopg
from sqlalchemy import make_url

import granq
from granq.v1 import coordinator_pb2
from tests.support.chaos.supervised import Supervised
from tests.support.coordinator import CoordinatorProcess, WorkerProcess
from tests.support.pipelines import spec as scripted_spec
from tests.support.postgres import PostgresServer
from tests.support.proxy import Proxies, Proxy
from tests.support.servers import ServerProcess

GRACE_SECONDS = 3
_COORDINATOR = {
    "sweep_seconds": "1",
    "unavailable_seconds": "120",
    "rpc_timeout_seconds": "10",
    "cancel_seconds": "2",
    "grace_seconds": str(GRACE_SECONDS),
}
_WORKER = {"lease_seconds": "5", "grace_seconds": str(GRACE_SECONDS), "max_running_jobs": "3"}
_ROLES = ("generator", "quantizer", "evaluator")


@dataclass
class Deployment:
    """Coordinators and their workers.

    Attributes:
        folder: Their files; the artifact store is in `artifacts`.
        servers: All of them.
        entrances: Proxies before the coordinators; clients use these.
        proxies: All proxies.
        specs: Pipelines to submit.
        database_url: Database of the coordinators.
    """

    folder: Path
    database_url: str
    servers: list[Supervised] = field(default_factory=list)
    entrances: list[Proxy] = field(default_factory=list)
    proxies: list[Proxy] = field(default_factory=list)
    specs: list[coordinator_pb2.PipelineSpec] = field(default_factory=list)

    def client(self, number: int = 0) -> granq.Client:
        """Return a client of one of the coordinators."""
        return granq.Client(self.entrances[number % len(self.entrances)].address, timeout=20, patience=30)

    def start(self, workers: list[ServerProcess], coordinators: list[ServerProcess], random: Random) -> None:
        """Start workers, then coordinators, each group at once."""
        for group in (workers, coordinators):
            supervised = [Supervised(server, Random(random.random())) for server in group]
            self.servers += supervised
            with ThreadPoolExecutor(len(group)) as pool:
                list(pool.map(Supervised.start, supervised))

    def end(self) -> None:
        """End all that still runs."""
        for server in reversed(self.servers):
            server.kill()


def _database(postgres: PostgresServer, name: str) -> str:
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return make_url(postgres.url).set(database=name).render_as_string(hide_password=False)


def _proxied(proxies: Proxies, deployment: Deployment, name: str, server: ServerProcess) -> Proxy:
    proxy = proxies.add(name, lambda: ("127.0.0.1", server.port))
    deployment.proxies.append(proxy)
    return proxy


def _coordinators(
    proxies: Proxies, deployment: Deployment, workers: dict[str, Proxy], names: list[str]
) -> list[ServerProcess]:
    made: list[ServerProcess] = []
    for name in names:
        addresses = {f"{role}_address": proxy.address for role, proxy in workers.items()}
        settings = {"database_url": deployment.database_url, "executor_id": name, **_COORDINATOR, **addresses}
        made.append(CoordinatorProcess(deployment.folder, "", name, **settings))
        deployment.entrances.append(_proxied(proxies, deployment, name, made[-1]))
    return made


@contextlib.contextmanager
def scripted(
    folder: Path, postgres: PostgresServer, proxies: Proxies, random: Random, *, small: bool
) -> Iterator[Deployment]:
    """Three scripted workers behind two coordinators on one database; one worker and one coordinator if `small`."""
    deployment = Deployment(folder, _database(postgres, "scripted"))
    names = ["worker"] if small else [f"scripted-{role}" for role in _ROLES]
    made = [WorkerProcess(folder, name, **_WORKER) for name in names]
    for kind in ("inspect", "synthesize", "quantize", "export", "evaluate"):
        made[0].script.tell(kind, step_seconds=0.05)
    behind = {role: made[number % len(made)] for number, role in enumerate(_ROLES)}
    workers = {role: _proxied(proxies, deployment, f"{role} of scripted", server) for role, server in behind.items()}
    coordinators = _coordinators(proxies, deployment, workers, ["pod-0"] if small else ["pod-0", "pod-1"])
    try:
        deployment.start(list(made), coordinators, random)
        with deployment.client() as client:
            for bits in (4,) if small else (2, 4, 8):
                model = client.upload(f"model {bits}".encode())
                spec = scripted_spec()
                spec.model.artifact.CopyFrom(model)
                spec.quantization.weight_bits = bits
                deployment.specs.append(spec)
        yield deployment
    finally:
        deployment.end()


@contextlib.contextmanager
def real(folder: Path, postgres: PostgresServer, proxies: Proxies, random: Random) -> Iterator[Deployment]:
    """The real generator, quantizer and evaluator behind a coordinator, for tiny models."""
    from tests.support.tiny_pipelines import tiny_spec  # loads PyTorch

    deployment = Deployment(folder, _database(postgres, "real"))
    settings = {**_WORKER, "max_running_jobs": "1", "dataset_root": str(folder)}
    generator = ServerProcess("generator", folder, synthesis_threads="1", **settings)
    workers = {"generator": _proxied(proxies, deployment, "generator", generator)}
    quantizer = ServerProcess("quantizer", folder, generator_address=workers["generator"].address, **settings)
    evaluator = ServerProcess("evaluator", folder, latency_repeats="2", **settings)
    workers["quantizer"] = _proxied(proxies, deployment, "quantizer", quantizer)
    workers["evaluator"] = _proxied(proxies, deployment, "evaluator", evaluator)
    coordinators = _coordinators(proxies, deployment, workers, ["coordinator"])
    try:
        deployment.start([generator, quantizer, evaluator], coordinators, random)
        with deployment.client() as client:
            deployment.specs.append(tiny_spec(client, folder))
        yield deployment
    finally:
        deployment.end()
