"""Joined measurements: right labels, right order, no float row twice."""

import pytest

from granq.v1 import jobs_pb2, reports_pb2
from services.coordinator.measurements import merge_evaluations, part_of
from tests.support.pipelines import measurement

FLOAT, SIMULATED = reports_pb2.MEASURED_FORM_FLOAT, reports_pb2.MEASURED_FORM_SIMULATED
ORT, TRT = reports_pb2.MEASURED_FORM_ONNX_ORT, reports_pb2.MEASURED_FORM_ONNX_TRT
TRAINED = reports_pb2.QuantizationResult(teacher_agreement=0.875, device="cpu")


def _result(*forms: reports_pb2.MeasuredForm, dataset: str = "fashion") -> reports_pb2.EvaluationResult:
    return reports_pb2.EvaluationResult(dataset=dataset, measurements=[measurement(form, form) for form in forms])


def _forms(result: reports_pb2.EvaluationResult) -> list[int]:
    return [row.form for row in result.measurements]


def test_graphs_and_simulation_are_joined_with_one_float_row() -> None:
    merged = merge_evaluations(_result(ORT, FLOAT, TRT), _result(FLOAT, SIMULATED), TRAINED)
    assert _forms(merged) == [FLOAT, SIMULATED, TRT, ORT]
    assert merged.dataset == "fashion"


def test_simulation_alone_keeps_its_float_row() -> None:
    assert _forms(merge_evaluations(None, _result(SIMULATED, FLOAT), TRAINED)) == [FLOAT, SIMULATED]


def test_whatever_the_quantizer_ran_is_called_simulated() -> None:
    assert _forms(merge_evaluations(_result(FLOAT), _result(TRT), TRAINED)) == [FLOAT, SIMULATED]


def test_without_labels_the_simulated_row_is_the_agreement() -> None:
    merged = merge_evaluations(_result(FLOAT, TRT, dataset="synthetic"), None, TRAINED)
    assert _forms(merged) == [FLOAT, SIMULATED, TRT]
    row = merged.measurements[1]
    assert row.accuracy.agreement == pytest.approx(87.5)
    assert not row.accuracy.HasField("top1")
    assert merge_evaluations(None, None, TRAINED).dataset == "synthetic"


def test_a_result_that_belongs_elsewhere_is_a_defect() -> None:
    assert part_of(jobs_pb2.JobResult(quantization=TRAINED)).quantization == TRAINED
    with pytest.raises(ValueError, match="evaluation"):
        part_of(jobs_pb2.JobResult(evaluation=_result(FLOAT)))
