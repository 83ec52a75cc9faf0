"""Small job functions for all kinds of the three workers: plausible results at once, and misbehaviour on demand.

The settings name a folder. A file `<kind>.json` in it tells the kind's jobs how to behave, and every run appends a line
to `runs.log`, so that a test can count them. Files are read while a job runs: a test can let a stalled job go on.
"""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from granq.v1 import common_pb2, evaluator_pb2, generator_pb2, jobs_pb2, quantizer_pb2, reports_pb2
from services.common.errors import CancelledError, from_failure
from services.common.jobs import JobContext
from services.common.settings import ServerSettings

_PAUSE = 0.01


class ScriptedSettings(ServerSettings):
    """Settings of a scripted worker."""

    script_dir: Path = Field(description="Folder of the script.")


class Script:
    """The folder that tells jobs what to do; used by tests and by jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def tell(self, kind: str, **behaviour: Any) -> None:
        """Set how a kind's jobs behave from now on.

        Args:
            kind: Kind of job.
            behaviour: `stall_at`: step at which to wait until told otherwise. `crash_at`: step at which the first run
                kills itself; `crash_always`: every run does. `fail`: code, reason and message to fail with.
                `step_seconds`: time that a step takes.
        """
        temporary = self.folder / f".{kind}.json"
        temporary.write_text(json.dumps(behaviour))
        temporary.rename(self.folder / f"{kind}.json")

    def read(self, kind: str) -> dict[str, Any]:
        """Return how a kind's jobs are to behave."""
        try:
            behaviour: dict[str, Any] = json.loads((self.folder / f"{kind}.json").read_text())
        except FileNotFoundError:
            return {}
        return behaviour

    def log(self, kind: str, what: str, job_id: str) -> None:
        """Note something."""
        with (self.folder / "runs.log").open("a") as file:
            file.write(f"{kind} {what} {job_id}\n")

    def lines(self, kind: str, what: str) -> list[str]:
        """Return the job ids of what was noted."""
        try:
            lines = (self.folder / "runs.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line.split()[2] for line in lines if line.startswith(f"{kind} {what} ")]


def _work(kind: str, context: JobContext, steps: int = 5) -> str:
    """Take some steps with a checkpoint after each, as the script says.

    Returns:
        A digest of the steps: another one when a step was left out or repeated.
    """
    script = Script(context.settings.script_dir)
    checkpoint = context.load_checkpoint()
    done, chain = 0, ""
    if checkpoint is not None:
        first, _, chain = context.store.read_bytes(checkpoint.digest).decode().partition(" ")
        done = int(first)
    script.log(kind, "begins", context.job_id)
    if done:
        script.log(kind, f"resumes_at_{done}", context.job_id)
    pause = threading.Event()
    while done < steps:
        behaviour = script.read(kind)
        try:
            context.check_cancelled()
        except CancelledError:
            script.log(kind, "is_cancelled", context.job_id)
            raise
        if "fail" in behaviour:
            raise from_failure(common_pb2.Failure(**behaviour["fail"]))
        if behaviour.get("stall_at") == done:
            context.report("working", done, steps)
            pause.wait(_PAUSE)
            continue
        crashed = len(script.lines(kind, "crashes"))
        if behaviour.get("crash_at") == done and (behaviour.get("crash_always") or not crashed):
            script.log(kind, "crashes", context.job_id)
            os.kill(os.getpid(), signal.SIGKILL)
        pause.wait(behaviour.get("step_seconds", 0))
        done += 1
        chain = hashlib.sha256(f"{chain} {kind} {done}".encode()).hexdigest()[:16]
        context.save_checkpoint(context.store.put_bytes(f"{done} {chain}".encode()))
        context.report("working", done, steps, loss_student=1 / done)
    script.log(kind, "ends", context.job_id)
    return chain


def _blob(context: JobContext, content: str) -> Any:
    return context.store.put_bytes(content.encode())


def inspect(request: quantizer_pb2.StartInspectRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Say that the model is a small one."""
    _work("inspect", context)
    return jobs_pb2.JobResult(inspection=reports_pb2.ModelSummary(input_shape=[3, 32, 32], num_classes=10))


def synthesize(request: generator_pb2.StartSynthesizeRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Store a set that depends on the request."""
    _work("synthesize", context)
    dataset = _blob(context, f"images {request.synthesis.num_images}")
    return jobs_pb2.JobResult(synthesis=reports_pb2.SynthesisResult(dataset=dataset, num_images=64))


def quantize(request: quantizer_pb2.StartQuantizeRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Store a model that depends on the request."""
    context.store.verify(request.synthetic_set.digest)
    chain = _work("quantize", context)
    model = _blob(context, f"quantized {request.quantization.weight_bits} {chain}")
    return jobs_pb2.JobResult(
        quantization=reports_pb2.QuantizationResult(model=model, iterations=5, teacher_agreement=0.9, device="cpu")
    )


def export(request: quantizer_pb2.StartExportRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Store three graphs."""
    _work("export", context)
    graphs = {name: _blob(context, name) for name in ("onnx_trt", "onnx_ort", "onnx_float")}
    return jobs_pb2.JobResult(export=reports_pb2.ExportResult(exact=True, **graphs))


def build_engine(request: evaluator_pb2.StartBuildEngineRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Store an engine; TensorRT proper is not installed here."""
    _work("build_engine", context)
    if request.target.runtime == common_pb2.RUNTIME_TENSORRT:
        raise from_failure(common_pb2.Failure(code=9, reason="RUNTIME_MISSING", message="install tensorrt"))
    manifest = reports_pb2.EngineManifest(
        engine=_blob(context, "engine"), runtime=common_pb2.RUNTIME_TENSORRT_RTX, platform="linux-x86_64"
    )
    built = reports_pb2.EngineBuildResult(manifest=manifest, manifest_file=_blob(context, "{}"), total_layers=20)
    return jobs_pb2.JobResult(engine=built)


def evaluate(request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Measure the three graphs; there is no GPU here for an engine."""
    if request.HasField("engine"):
        raise from_failure(common_pb2.Failure(code=9, reason="ENGINE_FOREIGN", message="no GPU here"))
    _work("evaluate", context)
    forms = (
        reports_pb2.MEASURED_FORM_FLOAT,
        reports_pb2.MEASURED_FORM_ONNX_TRT,
        reports_pb2.MEASURED_FORM_ONNX_ORT,
    )
    return _measured(forms, request.dataset.path or "synthetic")


def simulate(request: quantizer_pb2.StartSimulateRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Measure the simulation."""
    _work("simulate", context)
    return _measured((reports_pb2.MEASURED_FORM_FLOAT, reports_pb2.MEASURED_FORM_SIMULATED), request.dataset.path)


def _measured(forms: tuple[reports_pb2.MeasuredForm, ...], dataset: str) -> jobs_pb2.JobResult:
    rows = [reports_pb2.Measurement(form=form, accuracy=reports_pb2.Accuracy(images=100, top1=90)) for form in forms]
    return jobs_pb2.JobResult(evaluation=reports_pb2.EvaluationResult(measurements=rows, dataset=dataset))


FUNCTIONS: tuple[Callable[..., jobs_pb2.JobResult], ...] = (
    inspect,
    synthesize,
    quantize,
    export,
    build_engine,
    evaluate,
    simulate,
)
KINDS = {function.__name__: f"{__name__}:{function.__name__}" for function in FUNCTIONS}
