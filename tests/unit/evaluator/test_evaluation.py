import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from granq.v1 import artifacts_pb2, common_pb2, evaluator_pb2, reports_pb2
from services.common.errors import CancelledError, InvalidArgumentError, NotFoundError
from services.evaluator.evaluation import evaluate_graphs
from services.evaluator.graph import load_graph
from services.evaluator.onnx_runtime import OnnxModel
from tests.support.evaluator_bench import EvaluatorBench
from tests.support.onnx_graphs import images, quantized, saved

NPZ = common_pb2.DATASET_FORMAT_NPZ
FLOAT, TRT, ORT = (
    reports_pb2.MEASURED_FORM_FLOAT,
    reports_pb2.MEASURED_FORM_ONNX_TRT,
    reports_pb2.MEASURED_FORM_ONNX_ORT,
)


@pytest.fixture
def bench(tmp_path: Path) -> EvaluatorBench:
    return EvaluatorBench(tmp_path)


def logits_of(folder: Path, pixels: NDArray[np.float32], form: Any = TRT, **options: Any) -> NDArray[np.float32]:
    return OnnxModel(load_graph(saved(folder, "oracle", quantized(**options)), "f"), form, 1, "f").run(pixels)


def labelled(bench: EvaluatorBench, pixels: NDArray[np.float32], labels: NDArray[np.int64]) -> common_pb2.Dataset:
    np.savez(bench.datasets / "set.npz", images=pixels, labels=labels)
    return common_pb2.Dataset(path="set.npz", format=NPZ)


def synthetic(bench: EvaluatorBench, folder: Path, **tensors: NDArray[Any]) -> artifacts_pb2.Artifact:
    save_file(tensors, folder / "set.safetensors")
    return bench.store.put_file(folder / "set.safetensors")


def test_labelled_set(bench: EvaluatorBench, tmp_path: Path) -> None:
    pixels = images(23)
    # Codes of 4 bits stand for a model that differs from its float form.
    float_logits, low_logits = logits_of(tmp_path, pixels), logits_of(tmp_path, pixels, high=15)
    labels = float_logits.argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 5
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=bench.put(quantized()),
        onnx_trt=bench.put(quantized(high=15)),
        onnx_ort=bench.put(quantized(high=15, unsigned=True)),
        dataset=labelled(bench, pixels, labels),
        batch_size=4,
    )
    result = evaluate_graphs(request, bench.context)
    assert result.dataset == "set.npz"
    by_form = {m.form: m for m in result.measurements}
    assert list(by_form) == [FLOAT, TRT, ORT]
    assert {m.accuracy.images for m in by_form.values()} == {23}
    assert by_form[FLOAT].accuracy.top1 == pytest.approx(100 * 18 / 23)
    assert not by_form[FLOAT].accuracy.HasField("agreement")
    for form in (TRT, ORT):
        accuracy = by_form[form].accuracy
        predicted = low_logits.argmax(axis=1)
        assert accuracy.top1 == pytest.approx(100 * np.mean(predicted == labels))
        assert accuracy.agreement == pytest.approx(100 * np.mean(predicted == float_logits.argmax(axis=1)))
        noise = np.square(float_logits.astype(float) - low_logits).sum()
        ratio = np.square(float_logits.astype(float)).sum() / noise
        assert accuracy.sqnr_db == pytest.approx(10 * math.log10(ratio), abs=1e-3)
        assert accuracy.kl_divergence > 0
    assert (by_form[ORT].int8_layers, by_form[ORT].total_layers) == (2, 3)
    assert not by_form[TRT].HasField("int8_layers")
    for measurement in result.measurements:
        assert measurement.latency_ms_p50 > 0
        assert measurement.latency_batch == 4
        assert measurement.runtime.startswith("onnxruntime ")
        assert measurement.device
    phases = [p.phase for p in bench.reports]
    assert list(dict.fromkeys(phases)) == ["loading", "evaluating", "timing"]
    last = [p for p in bench.reports if p.phase == "evaluating"][-1]
    assert (last.step, last.total, last.metrics["top1_onnx_float"]) == (23, 23, by_form[FLOAT].accuracy.top1)


def test_synthetic_set_has_no_truth_and_only_its_held_out_images_count(bench: EvaluatorBench, tmp_path: Path) -> None:
    pixels = images(40)
    teacher = logits_of(tmp_path, pixels)
    teacher[:30] = -teacher[:30]  # were they looked at, they would disagree
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=bench.put(quantized()),
        onnx_ort=bench.put(quantized(unsigned=True)),
        synthetic_set=synthetic(bench, tmp_path, images=pixels, labels=np.zeros(40, np.int64), logits=teacher),
    )
    result = evaluate_graphs(request, bench.context)
    assert result.dataset == "synthetic"
    assert [m.form for m in result.measurements] == [FLOAT, ORT]
    for measurement in result.measurements:
        assert not measurement.accuracy.HasField("top1")
        assert measurement.accuracy.agreement == 100.0
        assert measurement.accuracy.images == 10
        assert measurement.accuracy.sqnr_db > 80
        assert measurement.latency_batch == 10


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": images(3)}, "logits"),
        ({"images": images(3).astype(np.float64), "logits": np.zeros((3, 5), np.float32)}, "float32"),
        ({"images": images(3), "logits": np.zeros((2, 5), np.float32)}, "shapes"),
        ({"images": images(3)[..., :4].copy(), "logits": np.zeros((3, 5), np.float32)}, "the model takes"),
        ({"images": images(3), "logits": np.zeros((3, 6), np.float32)}, "6 classes"),
        ({"images": images(3) * np.float32(np.nan), "logits": np.zeros((3, 5), np.float32)}, "finite"),
        ({"images": images(0), "logits": np.zeros((0, 5), np.float32)}, "no images"),
    ],
)
def test_unfit_synthetic_sets(
    bench: EvaluatorBench, tmp_path: Path, tensors: dict[str, NDArray[Any]], message: str
) -> None:
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=bench.put(quantized()), synthetic_set=synthetic(bench, tmp_path, **tensors)
    )
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        evaluate_graphs(request, bench.context)
    assert caught.value.field == "synthetic_set"


def test_damaged_synthetic_set(bench: EvaluatorBench) -> None:
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=bench.put(quantized()), synthetic_set=bench.store.put_bytes(b"\xff" * 64)
    )
    with pytest.raises(InvalidArgumentError, match="safetensors"):
        evaluate_graphs(request, bench.context)


def test_set_and_model_must_fit(bench: EvaluatorBench) -> None:
    wide = images(2)[:, :, :4]
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=bench.put(quantized()), dataset=labelled(bench, wide, np.zeros(2, int))
    )
    with pytest.raises(InvalidArgumentError, match="the model takes 3×8×8"):
        evaluate_graphs(request, bench.context)
    labelled(bench, images(2), np.array([0, 5]))
    with pytest.raises(InvalidArgumentError, match="classes 0 to 4"):
        evaluate_graphs(request, bench.context)


def test_missing_artifact(bench: EvaluatorBench) -> None:
    missing = artifacts_pb2.Artifact(digest="sha256:" + "0" * 64)
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=missing, dataset=labelled(bench, images(2), np.zeros(2, int))
    )
    with pytest.raises(NotFoundError) as caught:
        evaluate_graphs(request, bench.context)
    assert caught.value.field == "onnx_float"


def test_cancelled_between_batches(bench: EvaluatorBench) -> None:
    bench.on_report = lambda progress: bench.cancel() if progress.phase == "evaluating" else None
    request = evaluator_pb2.StartEvaluateRequest(
        onnx_float=bench.put(quantized()), dataset=labelled(bench, images(50), np.zeros(50, int)), batch_size=1
    )
    with pytest.raises(CancelledError):
        evaluate_graphs(request, bench.context)
    assert bench.reports[-1].step < 50
