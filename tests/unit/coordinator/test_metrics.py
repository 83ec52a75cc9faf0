"""The coordinator's figures: read from the database at a scrape, or told at each change."""

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from granq.v1 import common_pb2, coordinator_pb2, reports_pb2
from services.coordinator import metrics
from services.coordinator.metrics import PipelineCollector, observe_evaluation, reason_label
from services.coordinator.requests import STAGES, Stage
from services.coordinator.statistics import Statistics, read_statistics
from services.coordinator.tables import EventRow
from services.coordinator.transitions import State
from tests.support.pipelines import Database

HOUR = 3600 * 10**6
NOTHING = coordinator_pb2.PipelineResults()


def figure(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def ends(outcome: str) -> float:
    return figure("granq_pipeline_duration_seconds_count", outcome=outcome)


@pytest.fixture
def no_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_reasons", set())


def age(database: Database, pipeline_id: str, microseconds: int) -> None:
    """Make the events of a pipeline older than they are."""
    with Session(database.engine) as session, session.begin():
        rows = update(EventRow).where(EventRow.pipeline_id == pipeline_id)
        session.execute(rows.values(time=EventRow.time - microseconds))


def test_statistics_tell_waits_and_silence(sqlite: Database) -> None:
    assert read_statistics(sqlite.engine) == Statistics({}, 0.0, {}, {})
    waiting, fresh, silent, lively = (sqlite.create() for _ in range(4))
    for name, stage in ((silent, Stage.STAGE_QUANTIZE), (lively, Stage.STAGE_EXPORT)):
        assert sqlite.transitions.enter_stage(name, 1, stage)
    age(sqlite, waiting, HOUR)
    age(sqlite, silent, 2 * HOUR)
    found = read_statistics(sqlite.engine)
    assert found.by_state == {State.PIPELINE_STATE_QUEUED: 2, State.PIPELINE_STATE_RUNNING: 2}
    assert 3600 <= found.queue_oldest_seconds < 3660
    assert {stage: count for stage, (count, _) in found.stages.items()} == {
        Stage.STAGE_QUANTIZE: 1,
        Stage.STAGE_EXPORT: 1,
    }
    assert 7200 <= found.stages[Stage.STAGE_QUANTIZE][1] < 7260
    assert found.stages[Stage.STAGE_EXPORT][1] < 60
    assert sqlite.repository.get(fresh).pipeline.state == State.PIPELINE_STATE_QUEUED


def test_jobs_count_while_their_pipeline_runs(sqlite: Database) -> None:
    first, second, waiting = (sqlite.create() for _ in range(3))
    for name in (first, second):
        assert sqlite.transitions.enter_stage(name, 1, Stage.STAGE_QUANTIZE)
        sqlite.repository.open_job(name, f"{name}-job", "quantizer")
    sqlite.repository.open_job(first, "other", "evaluator")
    sqlite.repository.open_job(waiting, "early", "quantizer")
    assert read_statistics(sqlite.engine).open_jobs == {"quantizer": 2, "evaluator": 1}
    sqlite.repository.close_job(first, f"{first}-job")
    sqlite.transitions.fail(second, 1, common_pb2.Failure(code=13, reason="INTERNAL"))
    assert read_statistics(sqlite.engine).open_jobs == {"evaluator": 1}


def test_statistics_are_the_same_on_postgresql(database: Database) -> None:
    name = database.create()
    assert database.transitions.enter_stage(name, 1, Stage.STAGE_SYNTHESIZE)
    count, seconds = read_statistics(database.engine).stages[Stage.STAGE_SYNTHESIZE]
    assert count >= 1
    assert seconds >= 0


def test_a_scrape_without_a_database_tells_that_and_nothing_more() -> None:
    def away() -> Statistics:
        raise OperationalError("select", {}, Exception("connection refused"))

    (family,) = PipelineCollector(away).collect()
    assert [(s.name, s.value) for s in family.samples] == [("granq_database_up", 0)]
    full = PipelineCollector(
        lambda: Statistics({State.PIPELINE_STATE_QUEUED: 3}, 7.0, {4: (1, 2.5)}, {"quantizer": 2})
    ).collect()
    samples = {(s.name, *s.labels.values()): s.value for family in full for s in family.samples}
    assert samples["granq_database_up",] == 1
    assert samples["granq_pipelines", "queued"] == samples["granq_pipeline_queue_depth",] == 3
    assert samples["granq_pipelines", "failed"] == 0
    assert samples["granq_pipeline_queue_oldest_seconds",] == 7
    assert samples["granq_pipeline_jobs_open", "quantizer"] == 2
    assert samples["granq_pipeline_jobs_open", "evaluator"] == 0
    stages = {key[1]: value for key, value in samples.items() if key[0] == "granq_pipeline_stage_idle_seconds"}
    assert len(stages) == len(STAGES)
    assert sorted(stages.values())[-2:] == [0, 2.5]


def test_each_end_is_counted_once(sqlite: Database) -> None:
    before = {outcome: ends(outcome) for outcome in ("succeeded", "failed", "cancelled")}
    waits = figure("granq_pipeline_wait_seconds_count")
    change = sqlite.transitions
    good, bad, unwanted = (sqlite.create() for _ in range(3))
    for name in (good, bad):
        change.enter_stage(name, 1, Stage.STAGE_VALIDATE)
        change.enter_stage(name, 1, Stage.STAGE_REPORT)
    change.finish_stage(good, 1, Stage.STAGE_VALIDATE, NOTHING, last=False)
    change.finish_stage(good, 1, Stage.STAGE_REPORT, NOTHING, last=True)
    change.fail(bad, 1, common_pb2.Failure(code=13, reason="INTERNAL"))
    assert change.request_cancel(unwanted)
    change.finish_cancel(unwanted)
    change.finish_cancel(unwanted)
    assert {outcome: ends(outcome) - count for outcome, count in before.items()} == {
        "succeeded": 1,
        "failed": 1,
        "cancelled": 1,
    }
    assert figure("granq_pipeline_wait_seconds_count") == waits + 2


def row(form: int, top1: float | None = None, agreement: float | None = None) -> reports_pb2.Measurement:
    accuracy = reports_pb2.Accuracy(images=10, top1=top1, agreement=agreement)
    return reports_pb2.Measurement(form=form, accuracy=accuracy)  # type: ignore[arg-type] # a number of the enum


def test_drops_are_against_the_float_model() -> None:
    def drops(le: str, form: str) -> float:
        return figure("granq_evaluation_accuracy_drop_ratio_bucket", form=form, le=le)

    before = {key: drops(*key) for key in (("0.01", "onnx_ort"), ("0.02", "onnx_ort"), ("0.0", "simulated"))}
    differ = figure("granq_evaluation_disagreement_ratio_sum", form="onnx_ort")
    forms = reports_pb2.MeasuredForm
    observe_evaluation(
        reports_pb2.EvaluationResult(
            measurements=[
                row(forms.MEASURED_FORM_FLOAT, 90.0),
                row(forms.MEASURED_FORM_SIMULATED, 91.0),
                row(forms.MEASURED_FORM_ONNX_ORT, 88.5, 97.0),
            ]
        )
    )
    after = {key: drops(*key) - count for key, count in before.items()}
    assert after == {("0.01", "onnx_ort"): 0, ("0.02", "onnx_ort"): 1, ("0.0", "simulated"): 1}
    assert figure("granq_evaluation_disagreement_ratio_sum", form="onnx_ort") - differ == pytest.approx(0.03)
    assert not [s for f in metrics.ACCURACY_DROP.collect() for s in f.samples if s.labels["form"] == "float"]


def test_without_labels_there_is_no_drop() -> None:
    before = figure("granq_evaluation_accuracy_drop_ratio_count", form="onnx_trt")
    forms = reports_pb2.MeasuredForm
    rows = [row(forms.MEASURED_FORM_FLOAT), row(forms.MEASURED_FORM_ONNX_TRT, None, 99.0)]
    observe_evaluation(reports_pb2.EvaluationResult(measurements=rows))
    assert figure("granq_evaluation_accuracy_drop_ratio_count", form="onnx_trt") == before


@pytest.mark.usefixtures("no_reasons")
def test_reasons_are_bounded() -> None:
    labels = {reason_label(f"MADE_UP_{number}") for number in range(200)}
    assert len(labels) == 65
    assert "OTHER" in labels
    assert reason_label("MADE_UP_3") == "MADE_UP_3"
