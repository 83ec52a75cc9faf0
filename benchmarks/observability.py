"""What progress, metrics and traces cost: python -m benchmarks.observability [--out FILE].

Processor time of each piece, beside that of a training iteration, so that other work on the machine changes little.
"""

import argparse
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.accuracy.bench import load
from benchmarks.results_table import ROOT, Table
from granq.v1 import jobs_pb2
from services.common import metrics, tracing
from services.common.artifacts import ArtifactStore
from services.common.jobs.child import Outlet
from services.common.jobs.context import REPORT_SECONDS, JobContext
from services.common.jobs.run import Run
from services.common.jobs.wire import Frame
from services.common.logs import get_logger
from services.common.settings import ServerSettings
from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.calibrate import calibrate
from services.quantizer.config import GeneratorLosses, Quantization, Training
from services.quantizer.student import build_student
from services.quantizer.training import Trainer

FIGURES = {"loss_student": 0.25, "loss_generator": 1.5, "iterations_per_second": 12.0, "agreement": 0.9}
MODEL = ROOT / "examples" / "fashion_mnist" / "resnet20.pt2"
BATCH = 16


def microseconds(work: Callable[[], object], calls: int) -> float:
    """Return the processor time of one call: the least of five rounds of many."""
    work()
    rounds = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(calls):
            work()
        rounds.append((time.process_time() - began) / calls * 1e6)
    return min(rounds)


def trainer(folder: Path) -> Trainer:
    """Return a W4A4 training of the example's ResNet-20."""
    model = load(MODEL, folder, None)
    images = torch.randn(4 * BATCH, *model.input_shape)
    with torch.no_grad():
        logits = model.module(images)
    quantization = Quantization(4, 4)
    student = build_student(model.module, quantization)
    calibrate(student, images)
    training = Training(warmup_epochs=0, batch_size=BATCH).for_family(quantization)
    source = ReplaySource(Batch(images, logits.argmax(1), logits), BATCH, 0, torch.device("cpu"))
    return Trainer(student, training, GeneratorLosses(), source)


class Pieces:
    """Both ends of a job's progress, without a process between them."""

    def __init__(self, folder: Path) -> None:
        url = (folder / "store").as_uri()
        self._sink = Path(os.devnull).open("wb")  # noqa: SIM115 - lives as long as the program
        outlet = Outlet(self._sink)
        self._context = JobContext(
            "job",
            "pipeline",
            ArtifactStore(url),
            ServerSettings(port=0, artifact_url=url),
            get_logger("benchmarks"),
            lambda progress: outlet.send(Frame.PROGRESS, progress.SerializeToString()),
            threading.Event(),
        )
        self._run = Run("quantize", jobs_pb2.JobKey(job_id="job"), "digest")
        self._figures = metrics.TrainingMetrics("quantize").__enter__()
        self._payload = jobs_pb2.Progress(phase="training", step=1, total=9, metrics=FIGURES).SerializeToString()
        self._step = 0

    def report(self) -> None:
        """Report an iteration: nearly always held back."""
        self._step += 1
        self._context.report("training", self._step, 10**9, **FIGURES)

    def told(self) -> None:
        """Report one that is sent."""
        self.report()
        self._context.flush()

    def taken(self) -> None:
        """Do what the server does with it: an event for those who watch, and the gauges."""
        progress = jobs_pb2.Progress.FromString(self._payload)
        self._run.progress(progress)
        self._figures.observe(progress.metrics)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the table")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        training, pieces = trainer(Path(name)), Pieces(Path(name))
        iteration = microseconds(training.step, 10)
        report, told, taken = (
            microseconds(work, calls)
            for work, calls in ((pieces.report, 5000), (pieces.told, 500), (pieces.taken, 500))
        )
        figures = metrics.MethodMetrics("/benchmarks.Service/Method", False, False)
        rpc = microseconds(lambda: figures.end(figures.begin(), "OK", None), 5000)

        def spanned() -> None:
            with tracing.span("benchmark"):
                pass

        off = microseconds(spanned, 5000)
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"  # nobody takes the spans
        tracing.configure_tracing("benchmark")
        on = microseconds(spanned, 500)
    # Told at most once in 0.2 s, however many iterations that is; all others are held back.
    per_iteration = report + (told + taken) * iteration / (REPORT_SECONDS * 1e6)
    table = Table(
        out,
        "What progress, metrics and traces cost",
        ("piece", "µs of processor time", "share of an iteration"),
        [f"ResNet-20 of the example, W4A4, batch of {BATCH}, one thread; least of five rounds."],
    )
    for piece, cost in (
        ("iteration of training", iteration),
        ("report of an iteration, held back", report),
        ("report that is sent (five a second at most), in the job", told),
        ("the same at the server: event and gauges", taken),
        ("all reports, for one iteration", per_iteration),
        ("metrics of one RPC", rpc),
        ("a span, tracing off", off),
        ("a span, tracing on", on),
    ):
        table.add(piece, f"{cost:.2f}", f"{100 * cost / iteration:.4f} %")


if __name__ == "__main__":
    main()
