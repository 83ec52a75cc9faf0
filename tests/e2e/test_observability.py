"""A pipeline through four real servers, as metrics, rules, dashboards, traces and logs show it."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from granq.v1 import coordinator_pb2
from services.common.tracing import pipeline_trace
from services.coordinator.requests import STAGES
from tests.support.dashboards import Query, queries
from tests.support.observed import Observed, observed
from tests.support.prometheus import Rule, rules

# On a quiet machine the fixture takes half a minute; on a loaded one many times that.
pytestmark = pytest.mark.timeout(900)
SECONDS = 40.0
WINDOW = "15s"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with observed(tmp_path_factory.mktemp("observed")) as found:
        logs = "".join(f"\n--- {name}\n{server.log[-3000:]}" for name, server in found.servers.items())
        assert found.pipeline.state == coordinator_pb2.PIPELINE_STATE_SUCCEEDED, f"{found.pipeline.failure}{logs}"
        yield found


def series(run: Observed, expression: str) -> list[Any]:
    return run.prometheus.query_range(expression, run.begin, time.time(), 1)


def needs_a_gpu(query: Query) -> bool:
    return "granq_gpu_" in query.expression


def test_every_panel_has_data(run: Observed) -> None:
    deadline = time.monotonic() + SECONDS
    missing = [query for query in queries() if not needs_a_gpu(query)]
    while missing and time.monotonic() < deadline:
        missing = [query for query in missing if not series(run, query.promql(WINDOW))]
    assert missing == []


def test_panels_on_gpus_evaluate(run: Observed) -> None:
    for query in queries():
        if needs_a_gpu(query):
            series(run, query.promql(WINDOW))


def test_every_rule_is_evaluated_without_error(run: Observed) -> None:
    deadline = time.monotonic() + SECONDS
    names = {rule.name for rule in rules()}
    while True:
        groups = run.prometheus.get("rules")["groups"]
        found = {rule["name"]: rule for group in groups for rule in group["rules"]}
        if all(rule["health"] == "ok" for rule in found.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert set(found) == names
    assert {name: rule.get("lastError") for name, rule in found.items() if rule["health"] != "ok"} == {}


@pytest.mark.parametrize("rule", [rule for rule in rules() if not rule.alert], ids=lambda rule: rule.name)
def test_every_recorded_series_has_data(run: Observed, rule: Rule) -> None:
    assert series(run, rule.name)


def test_no_service_is_thought_down_or_absent(run: Observed) -> None:
    names = "GranqService.*|GranqRpc.*|GranqArtifact.*|GranqJobDied|GranqDatabase.*"
    assert run.prometheus.query(f'ALERTS{{alertname=~"{names}"}}') == []


def test_one_trace_holds_the_whole_pipeline(run: Observed) -> None:
    trace_id = pipeline_trace(run.pipeline.pipeline_id, 1)["traceparent"].split("-")[1]
    wanted = {f"stage {name}" for _, name in STAGES} | {
        "pipeline",
        "granq.v1.QuantizerService/StartQuantize",
        "job quantize",
        "run quantize",
        "phase training",
        "granq.v1.GeneratorService/CoTrain",
        "job build_engine",
    }
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        spans = {span.span_id: span for span in run.spans.spans() if span.trace_id == trace_id}
        if wanted <= {span.name for span in spans.values()}:
            break
        time.sleep(0.1)
    assert wanted - {span.name for span in spans.values()} == set()
    by_name = {span.name: span for span in spans.values()}

    def above(name: str) -> str:
        return spans[by_name[name].parent_id].name

    assert by_name["pipeline"].parent_id == ""
    assert above("stage quantize") == "pipeline"
    assert above("granq.v1.QuantizerService/StartQuantize") == "stage quantize"
    assert above("job quantize") == "granq.v1.QuantizerService/StartQuantize"
    assert above("run quantize") == "job quantize"
    assert above("phase training") == "run quantize"
    assert above("granq.v1.GeneratorService/CoTrain") == "run quantize"
    assert {span.service for span in spans.values()} == {f"granq-{name}" for name in run.servers}
    assert by_name["pipeline"].attributes["granq.pipeline.id"] == run.pipeline.pipeline_id
    (submitted,) = run.spans.spans("granq.v1.PipelineService/SubmitPipeline")
    assert submitted.links == (trace_id,)


def test_exemplars_and_logs_lead_to_the_trace(run: Observed) -> None:
    trace_id = pipeline_trace(run.pipeline.pipeline_id, 1)["traceparent"].split("-")[1]
    wanted = {"pipeline_id": run.pipeline.pipeline_id, "trace_id": trace_id}
    deadline = time.monotonic() + SECONDS
    labels: list[dict[str, str]] = []
    while wanted not in labels and time.monotonic() < deadline:  # until it has been scraped
        times = {"start": str(run.begin), "end": str(time.time())}
        found = run.prometheus.get("query_exemplars", query="granq_pipeline_duration_seconds_bucket", **times)
        labels = [exemplar["labels"] for group in found for exemplar in group["exemplars"]]
    assert wanted in labels
    for name, server in run.servers.items():
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        traced = [line for line in lines if line.get("trace_id") == trace_id]
        assert traced, name
        assert all(line.get("pipeline_id", run.pipeline.pipeline_id) == run.pipeline.pipeline_id for line in traced)


def test_figures_of_training_are_gone_with_their_job(run: Observed) -> None:
    assert series(run, 'granq_training_agreement_ratio{kind="quantize"}')
    assert run.prometheus.query("granq_training_loss") == []
