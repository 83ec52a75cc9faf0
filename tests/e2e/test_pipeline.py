"""Whole pipelines through four real servers and the public client: success, a killed worker, cancellation, refusals."""

import copy
import dataclasses
import importlib.util
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import onnxruntime
import pytest
import torch

import granq
from granq import targets
from granq.engines.machine import find_gpu
from granq.v1 import coordinator_pb2, reports_pb2
from tests.support.servers import ServerProcess
from tests.support.tiny_pipelines import CHECKPOINT_INTERVAL, EPOCH, LABELLED, tiny_spec
from tests.support.unusable_models import CASES, SHAPE
from tests.support.waiting import is_gone

TARGETS = ("rtx-ada", "cpu", "l4", "jetson-orin-nano")
# Of iterations. Those after the first checkpoint that holds a student which has learned, optimizers included.
LEARNED = EPOCH + CHECKPOINT_INTERVAL + 1

State = coordinator_pb2.PipelineState
Stage = coordinator_pb2.Stage
Event = coordinator_pb2.WatchPipelineResponse


@dataclasses.dataclass
class Deployment:
    """The four servers, a client, and a tiny model and a labelled set behind it."""

    servers: dict[str, ServerProcess]
    client: granq.Client
    spec: coordinator_pb2.PipelineSpec

    def watch(self, pipeline_id: str, seconds: float = 240.0) -> Iterator[Event]:
        return self.client.watch(pipeline_id, timeout=seconds)

    def logs(self) -> str:
        return "".join(f"\n--- {name}\n{server.log[-3000:]}" for name, server in self.servers.items())

    def children(self, *names: str) -> list[int]:
        return [child.pid for name in names for child in self.servers[name].children()]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("deployment")
    servers: dict[str, ServerProcess] = {}

    def start(name: str, **settings: str) -> None:
        servers[name] = ServerProcess(name, folder, dataset_root=str(folder), **settings).start()

    try:
        start("generator", synthesis_threads="1")
        start("evaluator", latency_repeats="2")
        start("quantizer", generator_address=servers["generator"].address, max_running_jobs="2")
        addresses = {f"{name}_address": server.address for name, server in servers.items()}
        start("coordinator", database_url=f"sqlite:///{folder / 'coordinator.sqlite'}", **addresses)
        with granq.Client(servers["coordinator"].address) as client:
            yield Deployment(servers, client, tiny_spec(client, folder))
        codes = {name: server.stop() for name, server in reversed(servers.items())}
        assert not any(codes.values()), codes
    finally:
        for server in servers.values():
            server.stop()


@dataclasses.dataclass
class Run:
    """A pipeline that has ended, and its events."""

    pipeline: coordinator_pb2.Pipeline
    events: list[Event]


def succeeded(deployment: Deployment, pipeline_id: str, events: list[Event]) -> Run:
    """Return a pipeline whose events were read to the end, once it is sure that they are whole and it went well."""
    pipeline = deployment.client.get(pipeline_id)
    assert pipeline.state == State.PIPELINE_STATE_SUCCEEDED, f"{pipeline.failure}{deployment.logs()}"
    assert [event.sequence for event in events] == list(range(1, pipeline.last_sequence + 1))
    assert events[-1].state == State.PIPELINE_STATE_SUCCEEDED
    return Run(pipeline, events)


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> Run:
    """A pipeline that nothing happened to, with an engine, and targets that get none for different reasons."""
    spec = copy.deepcopy(deployment.spec)
    spec.engines.extend(target.engine for target in targets.load_all(TARGETS))
    pipeline_id = deployment.client.submit(spec).pipeline_id
    return succeeded(deployment, pipeline_id, list(deployment.watch(pipeline_id)))


def test_all_stages_run_in_order_and_leave_their_results(undisturbed: Run) -> None:
    stages = [event.stage for event in undisturbed.events if event.stage]
    assert list(dict.fromkeys(stages)) == [number for number in Stage.values() if number]
    assert stages == sorted(stages)
    results = undisturbed.pipeline.results
    assert {field.name for field, _ in results.ListFields()} == {f.name for f in results.DESCRIPTOR.fields}
    assert (list(results.model.input_shape), results.model.num_classes) == (list(SHAPE), 10)
    assert results.synthesis.num_images == 48
    assert results.quantization.iterations == 3 * EPOCH
    assert len(results.export.layers) == len(results.model.layers)


def test_every_form_is_measured_and_the_exported_ones_agree(undisturbed: Run) -> None:
    forms = reports_pb2.MeasuredForm
    rows = {row.form: row for row in undisturbed.pipeline.results.evaluation.measurements}
    assert list(rows) == [
        forms.MEASURED_FORM_FLOAT,
        forms.MEASURED_FORM_SIMULATED,
        forms.MEASURED_FORM_ONNX_TRT,
        forms.MEASURED_FORM_ONNX_ORT,
    ]
    assert all(row.accuracy.images == LABELLED and row.accuracy.HasField("top1") for row in rows.values())
    assert rows[forms.MEASURED_FORM_FLOAT].accuracy.top1 == 100.0
    assert rows[forms.MEASURED_FORM_ONNX_TRT].accuracy.top1 == rows[forms.MEASURED_FORM_ONNX_ORT].accuracy.top1
    assert rows[forms.MEASURED_FORM_ONNX_ORT].latency_ms_p50 > 0


def test_each_target_gets_its_engine_or_its_reason(undisturbed: Run) -> None:
    results = undisturbed.pipeline.results
    outcomes = {outcome.target.name: outcome for outcome in results.engines}
    assert list(outcomes) == list(TARGETS)
    assert outcomes["cpu"].graph == results.export.onnx_ort
    failures = {name: outcome.failure for name, outcome in outcomes.items() if outcome.HasField("failure")}
    assert {failure.code for failure in failures.values()} == {grpc.StatusCode.FAILED_PRECONDITION.value[0]}
    assert failures["jetson-orin-nano"].reason == "TARGET_ELSEWHERE"
    assert "built on linux-aarch64" in failures["jetson-orin-nano"].message
    assert failures["l4"].reason in ("RUNTIME_NOT_INSTALLED", "GPU_REQUIRED", "TARGET_ELSEWHERE")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        assert failures["rtx-ada"].reason == "RUNTIME_NOT_INSTALLED"
        return
    engine = outcomes["rtx-ada"].engine
    assert list(engine.manifest.compute_capabilities) == ["8.9"]
    assert engine.manifest.onnx_digest == results.export.onnx_trt.digest
    assert engine.int8_layers == engine.total_layers
    assert not engine.float_layers
    if find_gpu() is None:
        (unmeasured,) = results.evaluation.unmeasured
        assert (unmeasured.target, unmeasured.failure.reason) == ("rtx-ada", "ENGINE_FOREIGN")
        assert "needs an NVIDIA GPU" in unmeasured.failure.message


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_the_builders_own_progress_reaches_those_who_watch(undisturbed: Run) -> None:
    told = [event.progress for event in undisturbed.events if event.stage == Stage.STAGE_BUILD_ENGINES]
    builds = [progress for progress in told if progress.phase.startswith("rtx-ada, engine 1 of 4: building: ")]
    assert builds, told
    assert all(0 <= progress.step <= progress.total for progress in builds)
    assert any(progress.total for progress in builds)


def test_bundle_holds_the_files(deployment: Deployment, undisturbed: Run, tmp_path: Path) -> None:
    results = undisturbed.pipeline.results
    held = {
        "model_quantized.safetensors": results.quantization.model,
        "model_trt.onnx": results.export.onnx_trt,
        "model_ort.onnx": results.export.onnx_ort,
        "model_float.onnx": results.export.onnx_float,
        "model.granq": results.export.package,
        "report.json": results.report,
        "report/synthetic_images.png": results.synthesis.grid,
        "report/diagnostics.json": results.quantization.diagnostics,
        "report/diagnostics.png": results.quantization.diagnostics_picture,
    }
    if results.engines[0].HasField("engine"):
        held["engines/1_rtx-ada.engine"] = results.engines[0].engine.manifest.engine
        held["engines/1_rtx-ada.json"] = results.engines[0].engine.manifest_file
    with zipfile.ZipFile(deployment.client.download(results.bundle, tmp_path)) as bundle:
        assert {name for name in bundle.namelist() if not name.startswith("triton/")} == {*held, "report.md"}
        assert bundle.read("triton/model_onnx/1/model.onnx") == bundle.read("model_ort.onnx")
        session = onnxruntime.InferenceSession(bundle.read("model_ort.onnx"), providers=["CPUExecutionProvider"])
        exact = onnxruntime.InferenceSession(bundle.read("model_trt.onnx"), providers=["CPUExecutionProvider"])
        config = bundle.read("triton/model_onnx/config.pbtxt").decode()
        # Both graphs fit the configuration: the other one serves processors on which the first one's kernels saturate.
        for tensor in (*session.get_inputs(), *session.get_outputs(), *exact.get_inputs(), *exact.get_outputs()):
            dims = ", ".join(map(str, tensor.shape[1:]))
            assert f'name: "{tensor.name}" data_type: TYPE_FP32 dims: [ {dims} ]' in config
        for name, artifact in held.items():
            path = deployment.client.download(artifact, tmp_path / Path(name).name)
            assert bundle.read(name) == path.read_bytes(), name


def is_training(event: Event) -> bool:
    """Whether the student has learned by now, and a checkpoint holds some of it."""
    return event.progress.phase == "training" and event.progress.step >= LEARNED


def test_a_quantizer_killed_in_training_resumes_to_the_same_model(deployment: Deployment, undisturbed: Run) -> None:
    quantizer = deployment.servers["quantizer"]
    pipeline_id = deployment.client.submit(deployment.spec).pipeline_id
    events: list[Event] = []
    killed_at = 0
    for event in deployment.watch(pipeline_id):
        events.append(event)
        if not killed_at and is_training(event):
            killed_at = event.progress.step
            port = quantizer.port
            quantizer.kill()
            quantizer.start()
            assert quantizer.port == port
    run = succeeded(deployment, pipeline_id, events)
    (trouble,) = (index for index, event in enumerate(events) if event.HasField("failure"))
    assert LEARNED <= killed_at < 3 * EPOCH, "the kill did not hit the training"
    assert events[trouble].state == State.PIPELINE_STATE_RUNNING
    assert events[trouble].failure.code == grpc.StatusCode.UNAVAILABLE.value[0]
    # The second run, from its first phase on: a training from the start would calibrate and warm up.
    quantizing = [event.progress for event in events if event.stage == Stage.STAGE_QUANTIZE]
    begin = max(index for index, progress in enumerate(quantizing) if progress.phase == "loading")
    assert "training" in {progress.phase for progress in quantizing[:begin]}
    again = [progress for progress in quantizing[begin:] if progress.phase]
    phases = list(dict.fromkeys(progress.phase for progress in again))
    assert phases == ["loading", "connecting", "training", "measuring"]
    assert next(progress.step for progress in again if progress.phase == "training") >= LEARNED
    assert run.pipeline.results.quantization.model.digest == undisturbed.pipeline.results.quantization.model.digest


def test_cancel_in_training_ends_everything_within_five_seconds(deployment: Deployment) -> None:
    spec = copy.deepcopy(deployment.spec)
    spec.training.epochs = 10_000
    pipeline_id = deployment.client.submit(spec).pipeline_id
    assert any(is_training(event) for event in deployment.watch(pipeline_id)), deployment.logs()
    children = deployment.children("quantizer"), deployment.children("generator")
    assert all(children)
    begin = time.monotonic()
    deployment.client.cancel(pipeline_id)
    pipeline = deployment.client.wait(pipeline_id, timeout=10)
    assert time.monotonic() - begin < 5
    assert pipeline.state == State.PIPELINE_STATE_CANCELLED
    running = [pid for pids in children for pid in pids]
    while running := [pid for pid in running if not is_gone(pid)]:
        assert time.monotonic() - begin < 5, f"still there: {running}{deployment.logs()}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def refused(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[coordinator_pb2.Pipeline, Path]]:
    """What became of each unusable model, all submitted at once, and the file that its code, if any, would create."""
    folder = tmp_path_factory.mktemp("unusable")
    submitted: dict[str, tuple[str, Path]] = {}
    for name, case in CASES.items():
        marker = folder / f"{name}.ran"
        spec = copy.deepcopy(deployment.spec)
        artifact = deployment.client.upload(case.make(folder / name, marker))
        spec.model.CopyFrom(granq.model_source(artifact, **case.source))
        submitted[name] = deployment.client.submit(spec).pipeline_id, marker
    return {
        name: (deployment.client.wait(pipeline_id, timeout=240), marker)
        for name, (pipeline_id, marker) in submitted.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_unusable_models_are_refused_before_anything_is_computed(
    name: str, refused: dict[str, tuple[coordinator_pb2.Pipeline, Path]]
) -> None:
    case, (pipeline, marker) = CASES[name], refused[name]
    assert (pipeline.state, pipeline.stage) == (State.PIPELINE_STATE_FAILED, Stage.STAGE_VALIDATE), pipeline
    failure = pipeline.failure
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], case.reason), failure
    assert failure.field == case.field
    assert case.words in failure.message
    assert not pipeline.results.ListFields()
    assert not marker.exists()


def test_servers_outlive_unusable_models(
    deployment: Deployment, refused: dict[str, tuple[coordinator_pb2.Pipeline, Path]]
) -> None:
    assert len(refused) == len(CASES)
    assert not any(is_gone(server.pid) for server in deployment.servers.values()), deployment.logs()
    failed = [p.pipeline_id for p in deployment.client.list(states=["PIPELINE_STATE_FAILED"])]
    assert sorted(failed) == sorted(pipeline.pipeline_id for pipeline, _ in refused.values())
