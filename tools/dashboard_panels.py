"""What the Grafana dashboards show: panels and their queries."""

from collections.abc import Sequence
from dataclasses import dataclass

JOB = 'job="granq"'
RATE = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: Its heading.
        unit: Grafana's name of the unit, such as "s", "bytes", "percentunit", "short".
        queries: Expression and legend of each query.
        kind: "graph" or "stat".
        about: What to read from it.
    """

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "graph"
    about: str = ""


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


def _mean(name: str, by: str) -> str:
    total, count = (f"sum by ({by}) (increase({name}_{part}{{{JOB}}}[1h]))" for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def _quantile(share: float, name: str, by: str, window: str = RATE) -> str:
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({name}_bucket{{{JOB}}}[{window}])))"


OPERATORS = (
    Row(
        "Services",
        (
            Panel("Services that answer", "short", [(f"sum by (service) (up{{{JOB}}})", "{{service}}")], "stat"),
            Panel("Pipelines that run", "short", [('max(granq_pipelines{state="running"})', "running")], "stat"),
            Panel("Pipelines that wait", "short", [(f"max(granq_pipeline_queue_depth{{{JOB}}})", "waiting")], "stat"),
            Panel("Oldest wait", "s", [(f"max(granq_pipeline_queue_oldest_seconds{{{JOB}}})", "waits")], "stat"),
            Panel("Database answers", "short", [(f"min(granq_database_up{{{JOB}}})", "up")], "stat"),
            Panel("Versions", "short", [(f"count by (version) (granq_build_info{{{JOB}}})", "{{version}}")], "stat"),
            Panel("Calls per second", "reqps", [("service:grpc_server_handled:rate5m", "{{service}}")]),
            Panel(
                "Calls that fail by the server's fault",
                "percentunit",
                [("service:grpc_server_faults:rate5m / (service:grpc_server_handled:rate5m > 0)", "{{service}}")],
            ),
            Panel(
                "99 of 100 short calls take less than",
                "s",
                [("service:grpc_server_handling_seconds:p99_5m", "{{service}}")],
                about="Exemplars lead to the trace, where tracing is on.",
            ),
            Panel("Calls in flight", "short", [(f"sum by (service) (grpc_server_in_flight{{{JOB}}})", "{{service}}")]),
            Panel(
                "Messages per second",
                "short",
                [
                    (
                        f"sum by (service) (rate(grpc_server_msg_received_total{{{JOB}}}[{RATE}]))",
                        "{{service}} received",
                    ),
                    (f"sum by (service) (rate(grpc_server_msg_sent_total{{{JOB}}}[{RATE}]))", "{{service}} sent"),
                ],
            ),
            Panel(
                "Calls that began and ended, per second",
                "reqps",
                [
                    (
                        f"sum by (grpc_method) (rate(grpc_server_started_total{{{JOB}}}[{RATE}]))",
                        "{{grpc_method}} began",
                    ),
                    (f"sum by (grpc_code) (rate(grpc_server_handled_total{{{JOB}}}[{RATE}]))", "{{grpc_code}}"),
                ],
            ),
        ),
    ),
    Row(
        "Pipelines",
        (
            Panel("Pipelines by state", "short", [(f"max by (state) (granq_pipelines{{{JOB}}})", "{{state}}")]),
            Panel("Ended in an hour", "short", [("outcome:granq_pipelines_ended:increase1h", "{{outcome}}")]),
            Panel(
                "From submission to end, mean of an hour",
                "s",
                [(_mean("granq_pipeline_duration_seconds", "outcome"), "{{outcome}}")],
            ),
            Panel(
                "Stages, mean of an hour", "s", [(_mean("granq_pipeline_stage_duration_seconds", "stage"), "{{stage}}")]
            ),
            Panel(
                "Longest silence of a stage",
                "s",
                [(f"max by (stage) (granq_pipeline_stage_idle_seconds{{{JOB}}})", "{{stage}}")],
                about="Time since the last event of a pipeline in this stage.",
            ),
            Panel(
                "Wait for the first stage, mean of an hour",
                "s",
                [(_mean("granq_pipeline_wait_seconds", "job"), "wait")],
            ),
        ),
    ),
    Row(
        "Jobs",
        (
            Panel("Jobs that run", "short", [(f"sum by (kind) (granq_jobs_running{{{JOB}}})", "{{kind}}")]),
            Panel("Jobs that wait", "short", [(f"sum by (kind) (granq_jobs_queued{{{JOB}}})", "{{kind}}")]),
            Panel(
                "Oldest waiting job", "s", [(f"max by (kind) (granq_job_queue_oldest_seconds{{{JOB}}})", "{{kind}}")]
            ),
            Panel(
                "Jobs ended in an hour",
                "short",
                [(f"sum by (kind, outcome) (increase(granq_jobs_total{{{JOB}}}[1h]))", "{{kind}} {{outcome}}")],
            ),
            Panel(
                "Processes that died in an hour",
                "short",
                [(f"sum by (kind) (increase(granq_job_process_deaths_total{{{JOB}}}[1h]))", "{{kind}}")],
            ),
            Panel("Duration, mean of an hour", "s", [(_mean("granq_job_duration_seconds", "kind"), "{{kind}}")]),
            Panel("Wait for a slot, mean of an hour", "s", [(_mean("granq_job_wait_seconds", "kind"), "{{kind}}")]),
            Panel(
                "Memory of jobs",
                "bytes",
                [(f"sum by (service, kind) (granq_job_resident_memory_bytes{{{JOB}}})", "{{kind}}")],
            ),
            Panel("CPUs that jobs keep busy", "short", [("kind:granq_job_cpu_seconds:rate5m", "{{kind}}")]),
        ),
    ),
    Row(
        "Artifacts and disks",
        (
            Panel(
                "Traffic of the store", "Bps", [("service:granq_artifact_bytes:rate5m", "{{service}} {{direction}}")]
            ),
            Panel(
                "Operations of the store, mean",
                "s",
                [("service:granq_artifact_operation_seconds:mean5m", "{{service}} {{operation}}")],
            ),
            Panel(
                "Operations that failed in an hour",
                "short",
                [(f"sum by (service) (increase(granq_artifact_errors_total{{{JOB}}}[1h]))", "{{service}}")],
            ),
            Panel("Free space", "percentunit", [("volume:granq_disk_free:ratio", "{{service}} {{volume}}")]),
            Panel("Free bytes", "bytes", [(f"min by (volume) (granq_disk_free_bytes{{{JOB}}})", "{{volume}}")]),
        ),
    ),
    Row(
        "Devices",
        (
            Panel("Devices by state", "short", [(f"max by (state) (granq_devices{{{JOB}}})", "{{state}}")]),
            Panel(
                "Jobs that wait for a device",
                "short",
                [(f"max by (target_kind) (granq_device_queue_depth{{{JOB}}})", "{{target_kind}}")],
            ),
        ),
    ),
    Row(
        "Processes",
        (
            Panel("CPUs of servers", "short", [(f"rate(process_cpu_seconds_total{{{JOB}}}[{RATE}])", "{{service}}")]),
            Panel("Memory of servers", "bytes", [(f"process_resident_memory_bytes{{{JOB}}}", "{{service}}")]),
            Panel(
                "Open files", "percentunit", [(f"process_open_fds{{{JOB}}} / process_max_fds{{{JOB}}}", "{{service}}")]
            ),
        ),
    ),
    Row(
        "GPUs",
        (
            Panel(
                "GPU in use",
                "percentunit",
                [(f"max by (instance, gpu) (granq_gpu_utilization_ratio{{{JOB}}})", "{{instance}} {{gpu}}")],
            ),
            Panel(
                "GPU memory",
                "percentunit",
                [
                    (
                        f"max by (instance, gpu) (granq_gpu_memory_used_bytes{{{JOB}}} / granq_gpu_memory_size_bytes)",
                        "{{instance}} {{gpu}}",
                    )
                ],
            ),
            Panel(
                "GPU temperature",
                "celsius",
                [(f"max by (instance, gpu) (granq_gpu_temperature_celsius{{{JOB}}})", "{{instance}} {{gpu}}")],
            ),
            Panel(
                "GPU power",
                "watt",
                [(f"max by (instance, gpu) (granq_gpu_power_watts{{{JOB}}})", "{{instance}} {{gpu}}")],
            ),
        ),
    ),
)

PIPELINE = (
    Row(
        "Stages",
        (
            Panel("Stage", "short", [(f"max by (stage) (granq_pipeline_stage_running{{{JOB}}}) > 0", "{{stage}}")]),
            Panel("Silence", "s", [(f"max by (stage) (granq_pipeline_stage_idle_seconds{{{JOB}}})", "{{stage}}")]),
            Panel("Stages, mean", "s", [(_mean("granq_pipeline_stage_duration_seconds", "stage"), "{{stage}}")]),
        ),
    ),
    Row(
        "Training",
        (
            Panel("Losses", "short", [(f"granq_training_loss{{{JOB}}}", "{{kind}} {{loss}}")]),
            Panel("Iterations per second", "short", [(f"granq_training_iterations_per_second{{{JOB}}}", "{{kind}}")]),
            Panel(
                "Agreement with the teacher",
                "percentunit",
                [(f"granq_training_agreement_ratio{{{JOB}}}", "{{kind}}")],
                about="On the training images of the moment.",
            ),
            Panel("Memory of jobs", "bytes", [(f"granq_job_resident_memory_bytes{{{JOB}}}", "{{kind}}")]),
            Panel(
                "CPUs of jobs",
                "short",
                [(f"sum by (kind) (rate(granq_job_cpu_seconds_total{{{JOB}}}[{RATE}]))", "{{kind}}")],
            ),
            Panel(
                "Traffic of the store",
                "Bps",
                [(f"sum by (direction) (rate(granq_artifact_bytes_total{{{JOB}}}[{RATE}]))", "{{direction}}")],
            ),
        ),
    ),
    Row(
        "Results",
        (
            Panel("Top-1 accuracy", "percentunit", [(f"granq_measured_top1_ratio{{{JOB}}}", "{{form}}")], "stat"),
            Panel(
                "Agreement with the float model",
                "percentunit",
                [(f"granq_measured_agreement_ratio{{{JOB}}}", "{{form}}")],
                "stat",
            ),
            Panel("Median time of a batch", "s", [(f"granq_measured_latency_seconds{{{JOB}}}", "{{form}}")], "stat"),
            Panel("Images per second", "short", [(f"granq_measured_images_per_second{{{JOB}}}", "{{form}}")], "stat"),
            Panel(
                "INT8 layers as they ran",
                "percentunit",
                [(f"granq_measured_int8_layers_ratio{{{JOB}}}", "{{form}}")],
                "stat",
            ),
            Panel(
                "INT8 layers of the engine",
                "percentunit",
                [(f"granq_engine_int8_layers_ratio{{{JOB}}}", "{{runtime}}")],
                "stat",
            ),
            Panel("Size of the engine", "bytes", [(f"granq_engine_size_bytes{{{JOB}}}", "{{runtime}}")], "stat"),
            Panel(
                "Engine builds, mean", "s", [(_mean("granq_engine_build_seconds", "runtime"), "{{runtime}}")], "stat"
            ),
            Panel(
                "Accuracy lost, mean of an hour",
                "percentunit",
                [(_mean("granq_evaluation_accuracy_drop_ratio", "form"), "{{form}}")],
                "stat",
            ),
            Panel(
                "Images of another class, mean of an hour",
                "percentunit",
                [(_mean("granq_evaluation_disagreement_ratio", "form"), "{{form}}")],
                "stat",
            ),
        ),
    ),
)
