"""Figures of trainings, as their jobs report them; each series lasts as long as a job of its kind runs."""

import re
from collections.abc import Mapping
from threading import Lock

from prometheus_client import Gauge

TRAINING_LOSS = Gauge("granq_training_loss", "Latest value of a loss, while a job trains.", ["kind", "loss"])
TRAINING_RATE = Gauge("granq_training_iterations_per_second", "Latest speed, while a job trains.", ["kind"])
TRAINING_AGREEMENT = Gauge(
    "granq_training_agreement_ratio",
    "Share of the latest training images, 0 to 1, whose top-1 is the teacher's, while a job trains.",
    ["kind"],
)

_LOSS = re.compile(r"loss(_[a-z0-9]+){0,4}")
_MAX_LOSSES = 32
_GAUGES = {"iterations_per_second": TRAINING_RATE, "agreement": TRAINING_AGREEMENT}
_lock = Lock()
_running: dict[str, int] = {}
_shown: dict[str, set[tuple[Gauge, tuple[str, ...]]]] = {}


class TrainingMetrics:
    """The figures of one run of a job. A context manager: its last values go with the last run of its kind.

    Args:
        kind: Kind of the job.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __enter__(self) -> "TrainingMetrics":
        with _lock:
            _running[self._kind] = _running.get(self._kind, 0) + 1
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _running[self._kind] -= 1
            if not _running[self._kind]:
                for gauge, labels in _shown.pop(self._kind, ()):
                    gauge.remove(*labels)

    def observe(self, figures: Mapping[str, float]) -> None:
        """Take over what the job reported: its "loss…" figures, "iterations_per_second" and "agreement".

        Other figures and, so that series stay bounded, losses beyond the first 32 names of a kind are left out.
        """
        with _lock:
            shown = _shown.setdefault(self._kind, set())
            for name, value in figures.items():
                labels: tuple[str, ...] = (self._kind,)
                gauge = _GAUGES.get(name)
                if gauge is None and _LOSS.fullmatch(name):
                    gauge, labels = TRAINING_LOSS, (self._kind, name)
                    if (gauge, labels) not in shown and sum(known is gauge for known, _ in shown) >= _MAX_LOSSES:
                        continue
                if gauge is not None:
                    shown.add((gauge, labels))
                    gauge.labels(*labels).set(value)
