"""The four servers, ways to send them an input, and what each answered."""

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

import granq
from granq.errors import GranqClientError, from_rpc_error
from granq.v1 import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    common_pb2,
    coordinator_pb2,
    evaluator_pb2,
    evaluator_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from services.common.artifacts import ArtifactStore
from services.common.settings import MIB
from tests.support.servers import ServerProcess
from tests.support.tiny_pipelines import tiny_spec

SECONDS = 180.0
READ_MEMORY_BYTES = 256 * MIB
_SAMPLE_SECONDS = 0.02
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(frozen=True)
class Answer:
    """How a server, or a command, answered an input.

    Attributes:
        code: Name of the gRPC status, or "exit N" of a command; "" when the input was taken.
        reason: The error's reason.
        field: Request field that it names.
        message: What it says.
    """

    code: str = ""
    reason: str = ""
    field: str = ""
    message: str = ""

    @classmethod
    def of_failure(cls, failure: common_pb2.Failure) -> "Answer":
        """Return the answer that a job or a pipeline ended with."""
        return cls(_CODES[failure.code], failure.reason, failure.field, failure.message)

    @classmethod
    def of_error(cls, error: GranqClientError) -> "Answer":
        """Return the answer of a call."""
        return cls(error.code.name, error.reason, error.field, error.message)


class Bench:
    """The four servers on one store, and a good pipeline to be spoilt.

    Attributes:
        folder: Where files are made; also the dataset root.
        servers: By name.
        store: Their artifact store.
        client: Of the coordinator.
        spec: A pipeline that would succeed.
    """

    def __init__(self, folder: Path, servers: dict[str, ServerProcess], client: granq.Client) -> None:
        self.folder, self.servers, self.client = folder, servers, client
        self.store = ArtifactStore((folder / "artifacts").as_uri())
        self.spec = tiny_spec(client, folder)
        self._numbers = itertools.count()

    def submit(self, change: Callable[[coordinator_pb2.PipelineSpec], object]) -> Answer:
        """Submit the pipeline with a change, and follow it to its end."""
        spec = copy.deepcopy(self.spec)
        change(spec)
        try:
            pipeline = self.client.wait(self.client.submit(spec).pipeline_id, timeout=SECONDS)
        except GranqClientError as error:
            return Answer.of_error(error)
        return Answer.of_failure(pipeline.failure) if pipeline.HasField("failure") else Answer()

    def model(self, path: Path, **source: object) -> Answer:
        """Submit the pipeline with another model."""
        named = granq.model_source(self.client.upload(path), **source)  # type: ignore[arg-type]
        return self.submit(lambda spec: spec.model.CopyFrom(named))

    def upload(self, header: artifacts_pb2.UploadHeader, content: bytes) -> Answer:
        """Upload bytes under a header that may not suit them."""
        request = artifacts_pb2.UploadArtifactRequest
        with grpc.insecure_channel(self.servers["coordinator"].address) as channel:
            call = artifacts_pb2_grpc.ArtifactServiceStub(channel).UploadArtifact
            try:
                call(iter([request(header=header), request(chunk=content)]), timeout=SECONDS)
            except grpc.RpcError as error:
                return Answer.of_error(from_rpc_error(error))
        return Answer()

    def evaluate(self, server: str = "evaluator", **fields: object) -> Answer:
        """Have the evaluator run graphs on a set."""
        request = evaluator_pb2.StartEvaluateRequest(key=self._key(), batch_size=8, **fields)  # type: ignore[arg-type]
        return self._job(self.servers[server], lambda stub: stub.StartEvaluate(request), request.key.job_id)

    def build(self, server: str = "evaluator", **fields: object) -> Answer:
        """Have the evaluator build an engine."""
        request = evaluator_pb2.StartBuildEngineRequest(key=self._key(), **fields)  # type: ignore[arg-type]
        return self._job(self.servers[server], lambda stub: stub.StartBuildEngine(request), request.key.job_id)

    def _key(self) -> jobs_pb2.JobKey:
        return jobs_pb2.JobKey(job_id=f"bad-{next(self._numbers)}", pipeline_id="bad")

    def _job(
        self, server: ServerProcess, start: Callable[[evaluator_pb2_grpc.EvaluatorServiceStub], object], job_id: str
    ) -> Answer:
        with grpc.insecure_channel(server.address) as channel:
            try:
                start(evaluator_pb2_grpc.EvaluatorServiceStub(channel))
                watch = jobs_pb2_grpc.JobServiceStub(channel).WatchJob
                *_, last = watch(jobs_pb2.WatchJobRequest(job_id=job_id), timeout=SECONDS)
            except grpc.RpcError as error:
                return Answer.of_error(from_rpc_error(error))
        return Answer.of_failure(last.job.failure) if last.job.HasField("failure") else Answer()

    def memory(self) -> dict[str, int]:
        """Return each server's resident memory in bytes; raises psutil.NoSuchProcess for one that has ended."""
        return {name: psutil.Process(server.pid).memory_info().rss for name, server in self.servers.items()}


@contextmanager
def running(folder: Path) -> Iterator[Bench]:
    """Run the servers on a folder; reading may take 256 MiB."""
    with ExitStack() as stack:
        servers: dict[str, ServerProcess] = {}

        def start(name: str, **settings: str) -> None:
            servers[name] = ServerProcess(
                name, folder, dataset_root=str(folder), read_memory_bytes=str(READ_MEMORY_BYTES), **settings
            ).start()
            stack.callback(servers[name].stop)

        start("generator", synthesis_threads="1")
        start("evaluator", latency_repeats="2")
        start("quantizer", generator_address=servers["generator"].address)
        addresses = {f"{name}_address": server.address for name, server in servers.items()}
        start("coordinator", database_url=f"sqlite:///{folder / 'coordinator.sqlite'}", **addresses)
        client = stack.enter_context(granq.Client(servers["coordinator"].address))
        yield Bench(folder, servers, client)


class PeakMemory:
    """Watches the processes below this one, within a `with` block.

    The kernel keeps the most that a process has ever held (VmHWM), which is read every 20 ms: what is missed is what a
    process takes more in the last 20 ms of its life. Pages of files count, such as those of libraries.

    Args:
        root: Process id.
        without: Ids of processes that do not count, while those below them do.
    """

    def __init__(self, root: int, without: Set[int]) -> None:
        self._root, self._without = root, without
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        """Look now."""
        for pid in _below(self._root):
            if pid not in self._without:
                self.bytes = max(self.bytes, _high_water(pid))


def _below(pid: int) -> Iterator[int]:
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _below(child)
    except (FileNotFoundError, ProcessLookupError):
        return  # It has ended meanwhile.


def _high_water(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
