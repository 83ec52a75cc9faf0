"""The quantizer's jobs through real servers: joint training, replay, faults, export."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from granq.v1 import common_pb2, generator_pb2, generator_pb2_grpc, jobs_pb2, jobs_pb2_grpc, quantizer_pb2, reports_pb2
from granq.v1.quantizer_pb2_grpc import QuantizerServiceStub
from services.common.artifacts import ArtifactStore
from services.common.models.cifar_resnet import CifarResNet
from services.common.package import read_package
from services.evaluator.graph import load_graph
from services.evaluator.onnx_runtime import OnnxModel
from services.quantizer.batches import read_synthetic_set
from tests.support.models import settle
from tests.support.servers import ServerProcess

# A connection of its own each time: a shared one would remember a server that was killed.
FRESH = [("grpc.use_local_subchannel_pool", 1)]
FINAL = (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED)
SHAPE = (1, 8, 8)
CO_TRAIN = common_pb2.TRAINING_MODE_CO_TRAIN


@dataclasses.dataclass
class Bench:
    """Two servers, a store, and a tiny model in it."""

    generator: ServerProcess
    quantizer: ServerProcess
    store: ArtifactStore
    model: common_pb2.ModelSource

    def jobs(self, server: ServerProcess) -> jobs_pb2_grpc.JobServiceStub:
        return jobs_pb2_grpc.JobServiceStub(grpc.insecure_channel(server.address, FRESH))

    @property
    def starts(self) -> QuantizerServiceStub:
        return QuantizerServiceStub(grpc.insecure_channel(self.quantizer.address, FRESH))

    def wait(
        self,
        server: ServerProcess,
        job_id: str,
        until: Callable[[jobs_pb2.Job], bool] | None = None,
        seconds: float = 120,
    ) -> jobs_pb2.Job:
        done = until or (lambda job: job.state in FINAL)
        for event in self.jobs(server).WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id), timeout=seconds):
            if done(event.job):
                return event.job
        raise AssertionError(f"job {job_id} ended without what was waited for:\n{server.log}")

    def quantize_request(self, job_id: str, synthetic: str, **training: object) -> quantizer_pb2.StartQuantizeRequest:
        settings = {"mode": CO_TRAIN, "iterations_per_epoch": 10, "batch_size": 8, "checkpoint_interval": 4, **training}
        request = quantizer_pb2.StartQuantizeRequest(
            key=jobs_pb2.JobKey(job_id=job_id, pipeline_id="p1"),
            model=self.model,
            quantization=common_pb2.QuantizationConfig(weight_bits=4, activation_bits=4),
            training=common_pb2.TrainingConfig(**settings),  # type: ignore[arg-type]
        )
        request.synthetic_set.digest = synthetic
        return request

    def weights(self, job: jobs_pb2.Job) -> dict[str, torch.Tensor]:
        assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.failure
        return load_file(self.store.local_path(job.result.quantization.model.digest))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("servers")
    generator = ServerProcess("generator", folder, dataset_root=str(folder)).start()
    quantizer = ServerProcess(
        "quantizer", folder, generator_address=generator.address, dataset_root=str(folder), max_running_jobs="2"
    ).start()
    store = ArtifactStore((folder / "artifacts").as_uri())
    weights = folder / "tiny.safetensors"
    save_file(settle(CifarResNet(3, 10, 1)).state_dict(), weights)
    model = common_pb2.ModelSource(artifact=store.put_file(weights), architecture="resnet20", input_shape=SHAPE)
    try:
        yield Bench(generator, quantizer, store, model)
    finally:
        assert quantizer.stop() == 0
        assert generator.stop() == 0


@pytest.fixture(scope="module")
def synthetic(bench: Bench) -> str:
    stub = generator_pb2_grpc.GeneratorServiceStub(grpc.insecure_channel(bench.generator.address))
    config = common_pb2.SynthesisConfig(num_images=48, iterations=6, batch_size=16)
    key = jobs_pb2.JobKey(job_id="synthesis")
    stub.StartSynthesize(generator_pb2.StartSynthesizeRequest(key=key, model=bench.model, synthesis=config))
    job = bench.wait(bench.generator, "synthesis")
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.failure
    return job.result.synthesis.dataset.digest


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, synthetic: str) -> jobs_pb2.Job:
    """A joint training that nothing happened to."""
    bench.starts.StartQuantize(bench.quantize_request("undisturbed", synthetic, epochs=3, warmup_epochs=1))
    return bench.wait(bench.quantizer, "undisturbed")


def past(step: int) -> Callable[[jobs_pb2.Job], bool]:
    return lambda job: job.progress.step >= step


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("victim", ["job", "quantizer", "generator"])
def test_a_killed_joint_training_resumes_to_the_same_weights(
    bench: Bench, synthetic: str, undisturbed: jobs_pb2.Job, victim: str
) -> None:
    request = bench.quantize_request(f"killed-{victim}", synthetic, epochs=3, warmup_epochs=1)
    bench.starts.StartQuantize(request)
    bench.wait(bench.quantizer, request.key.job_id, past(9))
    if victim == "job":
        for child in bench.quantizer.children():
            child.kill()
    elif victim == "quantizer":
        bench.quantizer.kill()
        bench.quantizer.start()
    else:
        bench.generator.kill()
        bench.generator.start()
    if victim != "quantizer":
        job = bench.wait(bench.quantizer, request.key.job_id)
        assert job.state == jobs_pb2.JOB_STATE_FAILED
        assert job.failure.code == grpc.StatusCode.UNAVAILABLE.value[0]
    bench.starts.StartQuantize(request)
    steps: list[int] = []

    def note(job: jobs_pb2.Job) -> bool:
        steps.append(job.progress.step)
        return job.state in FINAL

    job = bench.wait(bench.quantizer, request.key.job_id, note)
    assert_equal(bench.weights(job), bench.weights(undisturbed))
    # Loss curve and ratios before training come from the checkpoint.
    assert job.result.quantization.diagnostics.digest == undisturbed.result.quantization.diagnostics.digest
    first = next(step for step in steps if step)
    assert first > 4, "began anew instead of resuming from a checkpoint"


def test_the_diagnostics_of_a_training(bench: Bench, undisturbed: jobs_pb2.Job) -> None:
    result = undisturbed.result.quantization
    found = json.loads(bench.store.read_bytes(result.diagnostics.digest))
    assert [len(found["layers"]), found["images"]] == [22, 12]
    assert all(layer["after"]["sqnr_db"] is not None for layer in found["layers"])
    assert found["curve"]["iteration"] == list(range(1, 31))
    assert found["curve"]["rate"][:10] == [0.0] * 10
    assert any(found["curve"]["loss_generator"])
    assert bench.store.read_bytes(result.diagnostics_picture.digest).startswith(b"\x89PNG")


def test_replay_is_repeatable_and_uses_no_generator(bench: Bench, synthetic: str) -> None:
    results = []
    for job_id in ("replay-1", "replay-2"):
        bench.starts.StartQuantize(
            bench.quantize_request(job_id, synthetic, epochs=1, mode=common_pb2.TRAINING_MODE_REPLAY)
        )
        results.append(bench.weights(bench.wait(bench.quantizer, job_id)))
    assert_equal(*results)


def test_cancel_stops_training_within_five_seconds(bench: Bench, synthetic: str) -> None:
    bench.starts.StartQuantize(bench.quantize_request("cancelled", synthetic, epochs=5000, warmup_epochs=1))
    bench.wait(bench.quantizer, "cancelled", past(3))
    children = bench.quantizer.children()
    begin = time.monotonic()
    bench.jobs(bench.quantizer).CancelJob(jobs_pb2.CancelJobRequest(job_id="cancelled"))
    assert bench.wait(bench.quantizer, "cancelled").state == jobs_pb2.JOB_STATE_CANCELLED
    assert time.monotonic() - begin < 5
    assert not any(child.is_running() for child in children)


def test_inspection_lists_layers_and_refuses_unknown_ones(bench: Bench) -> None:
    quantization = common_pb2.QuantizationConfig(weight_bits=4, activation_bits=4)
    request = quantizer_pb2.StartInspectRequest(
        key=jobs_pb2.JobKey(job_id="inspect"), model=bench.model, quantization=quantization
    )
    bench.starts.StartInspect(request)
    summary = bench.wait(bench.quantizer, "inspect").result.inspection
    assert (summary.num_classes, list(summary.input_shape)) == (10, list(SHAPE))
    assert len(summary.layers) == 22
    assert summary.batch_norm_layers == 21
    request.key.job_id = "inspect-2"
    request.quantization.overrides.add(layer="no.such.layer", weight_bits=8)
    bench.starts.StartInspect(request)
    failure = bench.wait(bench.quantizer, "inspect-2").failure
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert failure.field == "quantization.overrides[0].layer"


def test_export_and_simulation_of_a_quantized_model(bench: Bench, synthetic: str, tmp_path: Path) -> None:
    bench.starts.StartQuantize(bench.quantize_request("calibrated", synthetic, epochs=0))
    quantized = bench.wait(bench.quantizer, "calibrated").result.quantization
    export = quantizer_pb2.StartExportRequest(
        key=jobs_pb2.JobKey(job_id="export"),
        model=bench.model,
        quantized_model=quantized.model,
        preprocessing=common_pb2.Preprocessing(pad=2, mean=[0.5]),
    )
    bench.starts.StartExport(export)
    result = bench.wait(bench.quantizer, "export").result.export
    assert result.exact
    assert len(result.layers) == 22
    for artifact in (result.onnx_trt, result.onnx_ort, result.onnx_float):
        onnx.checker.check_model(onnx.load_model_from_string(bench.store.read_bytes(artifact.digest)), full_check=True)
    package = read_package(bench.store.local_path(result.package.digest))
    assert package.rebuild_trt() == bench.store.read_bytes(result.onnx_trt.digest)
    assert package.manifest.onnx_ort.digest == result.onnx_ort.digest
    assert list(package.manifest.layers) == list(result.layers)
    assert (list(package.manifest.input_shape), package.manifest.num_classes) == (list(SHAPE), 10)
    assert package.manifest.preprocessing == common_pb2.Preprocessing(pad=2, mean=[0.5])
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(20) % 10)
    dataset = common_pb2.Dataset(
        format=common_pb2.DATASET_FORMAT_NPZ, artifact=bench.store.put_file(tmp_path / "set.npz")
    )
    key = jobs_pb2.JobKey(job_id="simulate")
    bench.starts.StartSimulate(
        quantizer_pb2.StartSimulateRequest(key=key, model=bench.model, quantized_model=quantized.model, dataset=dataset)
    )
    (measurement,) = bench.wait(bench.quantizer, "simulate").result.evaluation.measurements
    assert measurement.accuracy.images == 20
    np.savez(tmp_path / "wide.npz", images=np.zeros((1, 8, 9, 3), np.uint8), labels=np.zeros(1, int))
    dataset.artifact.CopyFrom(bench.store.put_file(tmp_path / "wide.npz"))
    key = jobs_pb2.JobKey(job_id="simulate-wide")
    bench.starts.StartSimulate(
        quantizer_pb2.StartSimulateRequest(key=key, model=bench.model, quantized_model=quantized.model, dataset=dataset)
    )
    failure = bench.wait(bench.quantizer, "simulate-wide").failure
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "dataset.preprocessing")


def test_what_is_exported_is_what_was_measured(bench: Bench, synthetic: str, tmp_path: Path) -> None:
    """The image's codes depend on what black and white are, which every job must know alike."""
    request = bench.quantize_request("normalized", synthetic, epochs=0)
    request.model.normalization.CopyFrom(common_pb2.Normalization(mean=[127 / 255], std=[128 / 255]))
    bench.starts.StartQuantize(request)
    quantized = bench.wait(bench.quantizer, "normalized").result.quantization
    with safe_open(bench.store.local_path(quantized.model.digest), framework="pt") as file:
        assert json.loads(file.metadata()["codes"])["codes_x"] == [-127, 128]
    key = jobs_pb2.JobKey(job_id="export-normalized")
    bench.starts.StartExport(
        quantizer_pb2.StartExportRequest(key=key, model=request.model, quantized_model=quantized.model)
    )
    trt = bench.wait(bench.quantizer, "export-normalized").result.export.onnx_trt
    images = read_synthetic_set(bench.store.local_path(synthetic), SHAPE, 10).held_out
    (tmp_path / "trt.onnx").write_bytes(bench.store.read_bytes(trt.digest))
    model = OnnxModel(load_graph(tmp_path / "trt.onnx", "graph"), reports_pb2.MEASURED_FORM_ONNX_TRT, 1, "graph")
    same = model.run(images.images.numpy()).argmax(1) == images.logits.argmax(1).numpy()
    assert same.mean() == pytest.approx(quantized.teacher_agreement, abs=1e-6)


def test_a_simulation_only_model_is_not_exported(bench: Bench, synthetic: str) -> None:
    request = bench.quantize_request("simulated", synthetic, epochs=1, mode=common_pb2.TRAINING_MODE_REPLAY)
    request.quantization.activation_granularity = common_pb2.ACTIVATION_GRANULARITY_PER_SAMPLE_CHANNEL
    bench.starts.StartQuantize(request)
    quantized = bench.wait(bench.quantizer, "simulated").result.quantization
    key = jobs_pb2.JobKey(job_id="export-simulated")
    bench.starts.StartExport(
        quantizer_pb2.StartExportRequest(key=key, model=bench.model, quantized_model=quantized.model)
    )
    failure = bench.wait(bench.quantizer, "export-simulated").failure
    assert failure.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert failure.reason == "SIMULATION_ONLY"
