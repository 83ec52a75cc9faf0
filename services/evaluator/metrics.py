"""The evaluator's metrics: what its jobs found out. Engines go by their runtime, forms of a model by their kind."""

from prometheus_client import Gauge, Histogram

from granq.v1 import common_pb2, jobs_pb2, reports_pb2

BUILD_SECONDS = Histogram(
    "granq_engine_build_seconds",
    "Time that an engine took to build, audit included.",
    ["runtime"],
    buckets=(1, 5, 15, 60, 300, 900, 3600),
)
ENGINE_INT8 = Gauge(
    "granq_engine_int8_layers_ratio",
    "Share, 0 to 1, of the latest engine's convolutions and linear layers that run in INT8, by its audit.",
    ["runtime"],
)
ENGINE_BYTES = Gauge("granq_engine_size_bytes", "Size of the latest engine.", ["runtime"])
LATENCY = Gauge("granq_measured_latency_seconds", "Median time of a batch, in the latest measurement.", ["form"])
THROUGHPUT = Gauge("granq_measured_images_per_second", "Images per second, in the latest measurement.", ["form"])
TOP1 = Gauge("granq_measured_top1_ratio", "Top-1 accuracy, 0 to 1, in the latest measurement with labels.", ["form"])
AGREEMENT = Gauge(
    "granq_measured_agreement_ratio",
    "Share of images, 0 to 1, whose top-1 is the float model's, in the latest measurement.",
    ["form"],
)
MEASURED_INT8 = Gauge(
    "granq_measured_int8_layers_ratio",
    "Share, 0 to 1, of convolutions and linear layers that ran as INT8 kernels, in the latest measurement.",
    ["form"],
)
DEVICE_REGISTERED = Gauge(
    "granq_device_registered", "1 while this evaluator has a lease in a coordinator's pool of devices, else 0."
)
for _runtime in ("tensorrt", "tensorrt_rtx"):
    # From the start, so that the first build shows as an increase.
    BUILD_SECONDS.labels(_runtime)


def observe(result: jobs_pb2.JobResult) -> None:
    """Take over the result of a job."""
    match result.WhichOneof("result"):
        case "engine":
            _observe_engine(result.engine)
        case "evaluation":
            for row in result.evaluation.measurements:
                _observe_measurement(row)


def _observe_engine(built: reports_pb2.EngineBuildResult) -> None:
    runtime = common_pb2.Runtime.Name(built.manifest.runtime).removeprefix("RUNTIME_").lower()
    BUILD_SECONDS.labels(runtime).observe(built.seconds)
    ENGINE_BYTES.labels(runtime).set(built.manifest.engine.size_bytes)
    if built.HasField("int8_layers") and built.total_layers:
        ENGINE_INT8.labels(runtime).set(built.int8_layers / built.total_layers)


def _observe_measurement(row: reports_pb2.Measurement) -> None:
    form = reports_pb2.MeasuredForm.Name(row.form).removeprefix("MEASURED_FORM_").lower()
    if row.HasField("latency_ms_p50") and row.latency_ms_p50 > 0:
        LATENCY.labels(form).set(row.latency_ms_p50 / 1000)
        tuned = next((batch for batch in row.batches if batch.batch == row.latency_batch), None)
        by_median = row.latency_batch / (row.latency_ms_p50 / 1000)
        THROUGHPUT.labels(form).set(tuned.images_per_second if tuned is not None else by_median)
    if row.accuracy.HasField("top1"):
        TOP1.labels(form).set(row.accuracy.top1 / 100)
    if row.accuracy.HasField("agreement"):
        AGREEMENT.labels(form).set(row.accuracy.agreement / 100)
    if row.HasField("int8_layers") and row.total_layers:
        MEASURED_INT8.labels(form).set(row.int8_layers / row.total_layers)
