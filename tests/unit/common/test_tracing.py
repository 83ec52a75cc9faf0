"""Traces: off unless the environment wants them, and then exported to a collector that stands in this process."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.common import tracing
from services.common.errors import FailedPreconditionError
from services.common.logs import configure_logging, get_logger
from tests.support.otlp import Collector, collector

ON = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.fixture(scope="module")
def collecting() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture
def traced(collecting: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name, value in collecting.environment().items():
        monkeypatch.setenv(name, value)
    tracing.configure_tracing("test")
    yield collecting
    tracing.shutdown_tracing()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        (ON, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({**ON, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ON, "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_the_environment_turns_it_on(environment: dict[str, str], wanted: bool) -> None:
    assert tracing.wanted(environment) is wanted


def test_off_costs_no_import_and_changes_nothing() -> None:
    script = """
import sys
from services.common import tracing
tracing.configure_tracing("test")
with tracing.span("nothing", tracing.pipeline_trace("p", 1), granq_job_id="a") as span:
    tracing.note_outcome(span, "failed")
    print(span, tracing.handover(), tracing.outgoing(), tracing.current_ids(), tracing.exemplar())
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    clean = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["None {} () {} None", "[]"]


def test_what_cannot_be_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "services.common.tracer", None)  # as if OpenTelemetry were not installed
    with pytest.raises(FailedPreconditionError, match=r"granq-pipeline\[tracing\]"):
        tracing.configure_tracing("test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(FailedPreconditionError, match="unset OTEL_EXPORTER_OTLP_PROTOCOL"):
        tracing.configure_tracing("test")
    assert not tracing.enabled()


def test_a_pipelines_root_span_has_the_ids_that_its_stages_name(traced: Collector) -> None:
    with tracing.span("stage export", tracing.pipeline_trace("p-root", 2)):
        inner = tracing.current_ids()
    tracing.record_pipeline("p-root", 2, "failed", 1_000_000, 3_500_000)
    tracing.shutdown_tracing()
    (root,) = traced.spans("pipeline")
    (stage,) = traced.spans("stage export")
    assert (root.trace_id, root.parent_id, root.error, root.seconds) == (stage.trace_id, "", True, 2.5)
    assert stage.parent_id == root.span_id
    assert inner == {"trace_id": stage.trace_id, "span_id": stage.span_id}
    assert root.service == "granq-test"
    assert tracing.pipeline_trace("p-root", 1) != tracing.pipeline_trace("p-root", 2)


def test_an_error_is_noted_and_goes_on(traced: Collector) -> None:
    with pytest.raises(KeyError), tracing.span("breaks"):
        raise KeyError("x")
    tracing.shutdown_tracing()
    (span,) = traced.spans("breaks")
    assert span.error


def test_log_lines_carry_the_ids_of_the_span_they_are_written_in(
    traced: Collector, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json")
    log = get_logger("test")
    with tracing.span("logs"):
        ids = tracing.current_ids()
        log.info("within")
    log.info("outside")
    within, outside = (json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{"))
    assert {key: within[key] for key in ids} == ids
    assert "trace_id" not in outside


def test_exemplars_name_the_trace(traced: Collector) -> None:
    with tracing.span("measured"):
        found = tracing.exemplar(pipeline_id="p")
        assert found == {"pipeline_id": "p", "trace_id": tracing.current_ids()["trace_id"]}
    assert tracing.exemplar() is None
