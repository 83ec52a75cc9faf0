"""A job of the evaluator without its server: context, store and settings in one folder."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from granq.v1 import artifacts_pb2, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.jobs import JobContext
from services.common.logs import get_logger
from services.evaluator.settings import EvaluatorSettings


class EvaluatorBench:
    """What a job function is given, with what it reports and a way to cancel it.

    Attributes:
        datasets: The dataset root.
        context: The job's context.
        store: The artifact store.
        reports: Progress told so far.
        on_report: Called with each progress.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.datasets = folder / "datasets"
        self.datasets.mkdir()
        url = (folder / "artifacts").as_uri()
        defaults: dict[str, Any] = {"onnx_threads": 1, "latency_repeats": 2}
        chosen = EvaluatorSettings(artifact_url=url, dataset_root=self.datasets, **(defaults | settings))
        self.store = ArtifactStore(url)
        self.reports: list[jobs_pb2.Progress] = []
        self.on_report: Callable[[jobs_pb2.Progress], None] = lambda progress: None
        self._cancelled = threading.Event()
        log = get_logger("tests")
        self.context = JobContext("job", "pipeline", self.store, chosen, log, self._send, self._cancelled)

    def _send(self, progress: jobs_pb2.Progress) -> None:
        self.reports.append(progress)
        self.on_report(progress)

    def cancel(self) -> None:
        """Ask the job to stop."""
        self._cancelled.set()

    def put(self, model: onnx.ModelProto) -> artifacts_pb2.Artifact:
        """Store a graph."""
        return self.store.put_bytes(model.SerializeToString(), name="model.onnx")
