"""Metrics are served on a free port, and their labels stay bounded."""

from urllib.request import urlopen

from prometheus_client import REGISTRY

from services.common import metrics


def test_served_on_a_free_port_until_closed() -> None:
    metrics.JOBS.labels("test-served", "succeeded").inc()
    server = metrics.MetricsServer("127.0.0.1", 0)
    try:
        with urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            text = answer.read().decode()
    finally:
        server.close()
    assert 'granq_jobs_total{kind="test-served",outcome="succeeded"} 1.0' in text


def test_figures_of_training_become_gauges() -> None:
    metrics.observe_training("test-kind", {"loss_student": 0.25, "iterations_per_second": 12.0, "seen": 3.0})
    assert REGISTRY.get_sample_value("granq_training_loss", {"kind": "test-kind", "loss": "loss_student"}) == 0.25
    assert REGISTRY.get_sample_value("granq_training_iterations_per_second", {"kind": "test-kind"}) == 12.0
    assert REGISTRY.get_sample_value("granq_training_loss", {"kind": "test-kind", "loss": "seen"}) is None
    metrics.end_training("test-kind")
    assert REGISTRY.get_sample_value("granq_training_iterations_per_second", {"kind": "test-kind"}) == 0.0


def test_number_of_series_is_bounded() -> None:
    metrics.observe_training("test-many", {f"loss_{i}": float(i) for i in range(1000)})
    series = [s for m in REGISTRY.collect() for s in m.samples if s.labels.get("kind") == "test-many"]
    assert len(series) == 32
