"""The real evaluator of a machine that is not this one, with scripted jobs: `python -m tests.support.scripted_device`.

Its jobs write down, again and again while they live, who they are. From that a test reads whether two ran at once.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from granq.engines.machine import Gpu
from granq.v1 import common_pb2, evaluator_pb2, jobs_pb2, reports_pb2
from services.common.jobs import JobContext
from services.common.rpc import run
from services.evaluator import device_info, runtimes, server, starting
from services.evaluator.settings import EvaluatorSettings
from tests.support.servers import ServerProcess

PLATFORM, DRIVER = "linux-aarch64", "540.4.0"
ROOT = Path(__file__).resolve().parents[2]
_PAUSE = 0.02


class ScriptedDeviceSettings(EvaluatorSettings):
    """Settings of a scripted device."""

    script_dir: Path = Field(description="Folder of the script.")
    tensorrt: str = Field(default="10.3.0", description="Version of TensorRT that it has.")
    capability: str = Field(default="8.7", description="Compute capability of its GPU.")


@dataclass(frozen=True)
class Life:
    """One run of a job: when it was first and last alive, on this machine's monotonic clock."""

    job_id: str
    device: str
    pid: int
    begin: float
    end: float
    done: bool

    def meets(self, other: "Life") -> bool:
        return self.begin <= other.end and other.begin <= self.end


class DeviceScript:
    """What devices are told, and what their jobs have written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def hold(self, device: str) -> None:
        """Have the jobs of a device go on until they may end."""
        (self.folder / f"{device}.hold").touch()

    def let_go(self, device: str) -> None:
        """Let the jobs of a device end."""
        (self.folder / f"{device}.hold").unlink()

    def holds(self, device: str) -> bool:
        return (self.folder / f"{device}.hold").exists()

    def note(self, what: str, job_id: str, device: str) -> None:
        line = json.dumps([what, job_id, device, os.getpid(), time.monotonic()])
        with (self.folder / "lives.jsonl").open("a") as file:
            file.write(line + "\n")

    def lives(self) -> list[Life]:
        """Return all runs, in the order in which they began."""
        found: dict[tuple[str, str, int], Life] = {}
        try:
            lines = (self.folder / "lives.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            what, job_id, device, pid, moment = json.loads(line)
            begin = found[job_id, device, pid].begin if (job_id, device, pid) in found else moment
            found[job_id, device, pid] = Life(job_id, device, pid, begin, moment, what == "done")
        return list(found.values())

    def assert_never_two_at_once(self) -> None:
        """Assert that no job lived twice at a time, nor a device had two jobs at a time."""
        lives = self.lives()
        for index, one in enumerate(lives):
            for other in lives[index + 1 :]:
                if one.job_id == other.job_id or one.device == other.device:
                    assert not one.meets(other), (one, other)


@contextmanager
def _alive(context: JobContext) -> Iterator[None]:
    settings: ScriptedDeviceSettings = context.settings
    script = DeviceScript(settings.script_dir)
    script.note("begins", context.job_id, settings.device_id)
    pause = threading.Event()
    while script.holds(settings.device_id):
        context.check_cancelled()
        context.report("building", 1, 3)
        script.note("lives", context.job_id, settings.device_id)
        pause.wait(_PAUSE)
    yield
    script.note("done", context.job_id, settings.device_id)


def build_engine(request: evaluator_pb2.StartBuildEngineRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Store an engine that tells which device made it from which graph."""
    settings: ScriptedDeviceSettings = context.settings
    graph = context.store.local_path(request.onnx_trt.digest).read_bytes()
    with _alive(context):
        engine = context.store.put_bytes(settings.device_id.encode() + b" made this from " + graph)
        manifest = reports_pb2.EngineManifest(
            engine=engine,
            onnx_digest=request.onnx_trt.digest,
            runtime=common_pb2.RUNTIME_TENSORRT,
            runtime_version=settings.tensorrt,
            compute_capabilities=[settings.capability],
            platform=PLATFORM,
            driver_version=DRIVER,
        )
        built = reports_pb2.EngineBuildResult(manifest=manifest, manifest_file=context.store.put_bytes(b"{}"))
    return jobs_pb2.JobResult(engine=built)


def evaluate(request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Measure an engine, whose bytes must be there."""
    settings: ScriptedDeviceSettings = context.settings
    context.store.verify(request.engine.engine.digest)
    row = reports_pb2.Measurement(
        form=reports_pb2.MEASURED_FORM_ENGINE,
        device=settings.device_id,
        accuracy=reports_pb2.Accuracy(images=100, top1=90),
    )
    return jobs_pb2.JobResult(evaluation=reports_pb2.EvaluationResult(measurements=[row], dataset="synthetic"))


def _become(settings: ScriptedDeviceSettings) -> None:
    """Make the modules of this process see the machine that the settings tell of."""
    gpu = Gpu("Orin", settings.capability, 8 * 1024**3)
    versions = {runtimes.TENSORRT.module: settings.tensorrt}
    kinds = {kind: f"{_NAME}:{kind}" for kind in starting.KINDS}
    for place, name, value in (
        (runtimes, "find_gpu", lambda: gpu),
        (device_info, "find_gpu", lambda: gpu),
        (runtimes, "platform_name", lambda: PLATFORM),
        (runtimes, "driver_version", lambda: DRIVER),
        (runtimes.EngineRuntime, "version", lambda runtime: versions.get(runtime.module)),
        (starting, "require_fit", lambda manifest: None),
        (server, "KINDS", kinds),
    ):
        setattr(place, name, value)


_NAME = "tests.support.scripted_device"


class DeviceProcess(ServerProcess):
    """A scripted device in a process of its own, with files of its own."""

    def __init__(self, name: str, folder: Path, coordinator: str, **settings: str) -> None:
        own = folder / name
        own.mkdir(exist_ok=True)
        chosen = {"device_id": name, "coordinator_address": coordinator, "script_dir": str(folder / "script")}
        super().__init__(name, own, **chosen | settings)

    @property
    def module(self) -> str:
        return _NAME

    def environment(self) -> dict[str, str]:
        inherited = dict(super().environment())
        return inherited | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}


def main() -> None:
    """Serve until SIGTERM."""
    # By its full name, which the processes of its jobs import.
    from tests.support import scripted_device

    settings = scripted_device.ScriptedDeviceSettings()
    scripted_device._become(settings)
    run("evaluator", settings, server.create_server)


if __name__ == "__main__":
    main()
