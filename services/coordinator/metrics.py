"""The coordinator's metrics."""

from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import DBAPIError

from granq.v1 import reports_pb2
from services.common.logs import get_logger
from services.coordinator.requests import STAGES
from services.coordinator.statistics import Statistics
from services.coordinator.transitions import State, state_name

STAGE_SECONDS = Histogram(
    "granq_pipeline_stage_duration_seconds",
    "Time from the begin of a stage, in this process, to its end.",
    ["stage", "outcome"],
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600),
)
JOB_RETRIES = Counter("granq_pipeline_job_retries", "Repeated starts of worker jobs, by cause.", ["worker", "reason"])
FAILURES = Counter("granq_pipeline_failures", "Stages that failed and with them their pipeline.", ["stage", "reason"])
ACCURACY_DROP = Histogram(
    "granq_evaluation_accuracy_drop_ratio",
    "Top-1 accuracy, 0 to 1, that a form of a model lost against the float model; 0 where it lost nothing.",
    ["form"],
    buckets=(0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
)
DISAGREEMENT = Histogram(
    "granq_evaluation_disagreement_ratio",
    "Share of images, 0 to 1, for which a form of a model names another class than the float model.",
    ["form"],
    buckets=(0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
)

_MAX_REASONS = 64
_reasons: set[str] = set()
_log = get_logger(__name__)


def form_name(form: int) -> str:
    """Return the label of a form, such as "onnx_ort"."""
    return reports_pb2.MeasuredForm.Name(form).removeprefix("MEASURED_FORM_").lower()


for _, _stage in STAGES:
    for _outcome in ("succeeded", "failed"):
        # From the start, so that the first one shows as an increase.
        STAGE_SECONDS.labels(_stage, _outcome)
for _form in reports_pb2.MeasuredForm.values():
    if _form not in (reports_pb2.MEASURED_FORM_UNSPECIFIED, reports_pb2.MEASURED_FORM_FLOAT):
        ACCURACY_DROP.labels(form_name(_form))
        DISAGREEMENT.labels(form_name(_form))


def reason_label(reason: str) -> str:
    """Return a failure's reason as a label; at most 64, for they come from workers, which may be of any version."""
    if reason not in _reasons and len(_reasons) >= _MAX_REASONS:
        return "OTHER"
    _reasons.add(reason)
    return reason


def observe_evaluation(evaluation: reports_pb2.EvaluationResult) -> None:
    """Take over how far the quantized forms of a model stay behind it."""
    float_top1 = next(
        (
            row.accuracy.top1
            for row in evaluation.measurements
            if row.form == reports_pb2.MEASURED_FORM_FLOAT and row.accuracy.HasField("top1")
        ),
        None,
    )
    for row in evaluation.measurements:
        if row.form == reports_pb2.MEASURED_FORM_FLOAT:
            continue
        if float_top1 is not None and row.accuracy.HasField("top1"):
            ACCURACY_DROP.labels(form_name(row.form)).observe(max(0.0, float_top1 - row.accuracy.top1) / 100)
        if row.accuracy.HasField("agreement"):
            DISAGREEMENT.labels(form_name(row.form)).observe(1 - row.accuracy.agreement / 100)


class PipelineCollector(Collector):
    """Asks the database at the moment of a scrape, so that nothing has to be counted in between.

    Coordinators that share a database all show the same figures, so queries take their maximum, not their sum.

    Args:
        statistics: Reads the figures; called from the metrics server's thread.
    """

    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        self._statistics = statistics

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics without values, so that registering asks no database."""
        yield GaugeMetricFamily("granq_database_up", "1 when the coordinator's database answered this scrape, else 0.")
        yield GaugeMetricFamily("granq_pipelines", "Pipelines by state.", labels=["state"])
        yield GaugeMetricFamily("granq_pipeline_queue_depth", "Pipelines that wait for their first stage.")
        yield GaugeMetricFamily(
            "granq_pipeline_queue_oldest_seconds",
            "Time that the pipeline which has waited longest waits for its first stage; 0 when none does.",
        )
        yield GaugeMetricFamily(
            "granq_pipeline_jobs_open",
            "Jobs that pipelines have at a worker, or want to have there while it is busy or away.",
            labels=["worker"],
        )
        yield GaugeMetricFamily("granq_pipeline_stage_running", "Pipelines in a stage now.", labels=["stage"])
        yield GaugeMetricFamily(
            "granq_pipeline_stage_idle_seconds",
            "Longest time without an event of a pipeline that is in this stage; 0 when none is.",
            labels=["stage"],
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics as they are now; without a database only that it is away."""
        up, by_state, depth, oldest, jobs, running, idle = self.describe()
        try:
            found = self._statistics()
        except DBAPIError as error:
            _log.warning("no metrics of pipelines: the database does not answer", error=str(error.orig))
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        for state in State.values():
            if state != State.PIPELINE_STATE_UNSPECIFIED:
                by_state.add_metric([state_name(state).lower()], found.by_state.get(state, 0))
        depth.add_metric([], found.by_state.get(State.PIPELINE_STATE_QUEUED, 0))
        oldest.add_metric([], found.queue_oldest_seconds)
        for worker in ("generator", "quantizer", "evaluator"):
            jobs.add_metric([worker], found.open_jobs.get(worker, 0))
        for stage, name in STAGES:
            count, seconds = found.stages.get(stage, (0, 0.0))
            running.add_metric([name], count)
            idle.add_metric([name], seconds)
        yield from (up, by_state, depth, oldest, jobs, running, idle)

    def register(self) -> None:
        """Let scrapes see the metrics."""
        REGISTRY.register(self)

    def unregister(self) -> None:
        """Take the metrics back."""
        REGISTRY.unregister(self)
