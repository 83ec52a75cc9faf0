"""Metrics are served on a free port, their labels stay bounded, and what lasts as long as a job goes with it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
from prometheus_client import REGISTRY, Metric

from services.common import metrics
from services.common.errors import UnavailableError
from services.common.metrics.artifacts import OPERATIONS, artifact_operation
from services.common.metrics.gpu import GpuCollector
from services.common.settings import ServerSettings

value = REGISTRY.get_sample_value


@pytest.fixture
def server() -> Iterator[metrics.MetricsServer]:
    running = metrics.MetricsServer("127.0.0.1", 0)
    yield running
    running.close()


def scrape(server: metrics.MetricsServer, accept: str = "") -> tuple[str, str]:
    request = Request(f"http://127.0.0.1:{server.port}/metrics", headers={"Accept": accept} if accept else {})
    with urlopen(request) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


def test_served_on_a_free_port_until_closed(server: metrics.MetricsServer) -> None:
    metrics.JOBS.labels("test-served", "succeeded").inc()
    text, _ = scrape(server)
    assert 'granq_jobs_total{kind="test-served",outcome="succeeded"} 1.0' in text
    assert "granq_jobs_created" not in text


def test_exemplars_are_served_in_openmetrics_alone(server: metrics.MetricsServer) -> None:
    figures = metrics.MethodMetrics("/test.Service/Exemplar", False, False)
    figures.end(figures.begin(), "OK", {"trace_id": "ab" * 16})
    plain, _ = scrape(server)
    assert "trace_id" not in plain
    text, kind = scrape(server, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    (line,) = [line for line in text.splitlines() if "trace_id" in line]
    assert line.startswith("grpc_server_handling_seconds_bucket{")
    assert '# {trace_id="abababab' in line
    assert text.endswith("# EOF\n")


def test_figures_of_training_last_as_long_as_a_job_of_their_kind() -> None:
    loss = {"kind": "test-kind", "loss": "loss_student"}
    with metrics.TrainingMetrics("test-kind") as first:
        with metrics.TrainingMetrics("test-kind") as second:
            first.observe({"loss_student": 0.25, "iterations_per_second": 12.0, "seen": 3.0})
            second.observe({"loss_student": 0.5, "agreement": 0.75})
            assert value("granq_training_loss", loss) == 0.5
            assert value("granq_training_loss", {"kind": "test-kind", "loss": "seen"}) is None
        assert value("granq_training_iterations_per_second", {"kind": "test-kind"}) == 12.0
        assert value("granq_training_agreement_ratio", {"kind": "test-kind"}) == 0.75
    assert value("granq_training_loss", loss) is None
    assert value("granq_training_iterations_per_second", {"kind": "test-kind"}) is None
    assert value("granq_training_agreement_ratio", {"kind": "test-kind"}) is None


def test_number_of_series_is_bounded() -> None:
    with metrics.TrainingMetrics("test-many") as figures:
        figures.observe({f"loss_{i}": float(i) for i in range(1000)})
        figures.observe({"loss_0": 7.0})
        series = [s for m in REGISTRY.collect() for s in m.samples if s.labels.get("kind") == "test-many"]
        assert len(series) == 32
        assert value("granq_training_loss", {"kind": "test-many", "loss": "loss_0"}) == 7.0


def test_the_longest_wait_is_that_of_the_oldest() -> None:
    def oldest() -> float | None:
        return value("granq_job_queue_oldest_seconds", {"kind": "test-queue"})

    assert oldest() is None
    with metrics.QUEUE_AGES.waiting("test-queue"):
        first = oldest()
        assert first is not None
        with metrics.QUEUE_AGES.waiting("test-queue"):
            second = oldest()
            assert second is not None
            assert second >= first
    assert oldest() == 0


def test_memory_of_a_job_is_that_of_its_processes_too() -> None:
    # A process that only waits for one below it, which holds 64 MiB.
    below = "import sys; block = b'x' * 2**26; print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {below!r}])"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with metrics.CHILDREN.watched(process.pid, "test-memory"):
            used = value("granq_job_resident_memory_bytes", {"kind": "test-memory"})
            assert used is not None
            assert used > 2**26
            process.communicate()
            assert value("granq_job_resident_memory_bytes", {"kind": "test-memory"}) == 0


def test_what_a_job_counted_is_added_once() -> None:
    before = metrics.take_sums()
    metrics.ARTIFACT_BYTES.labels("write").inc(10)
    with pytest.raises(UnavailableError), artifact_operation("publish"):
        raise UnavailableError("away")
    with pytest.raises(FileNotFoundError), artifact_operation("stat"):
        raise FileNotFoundError
    after = metrics.take_sums()
    since = metrics.sums_since(after, before)
    assert since["bytes"] == {"write": 10.0}
    assert since["operations"] == {"publish": 1.0, "stat": 1.0}
    assert since["errors"] == {"publish": 1.0}
    assert set(since["seconds"]) == {"publish", "stat"}
    assert metrics.sums_since(after, after) == {}
    metrics.add_sums("test-sums", since | {"cpu": {"": 2.5}})
    assert metrics.take_sums()["bytes"]["write"] == after["bytes"]["write"] + 10
    assert value("granq_job_cpu_seconds_total", {"kind": "test-sums"}) == 2.5


def test_all_operations_have_a_series_of_errors_from_the_start() -> None:
    assert all(value("granq_artifact_errors_total", {"operation": name}) is not None for name in OPERATIONS)


def test_disks_are_those_of_the_settings(tmp_path: Path) -> None:
    settings = ServerSettings(port=0, artifact_url=(tmp_path / "store").as_uri())
    with metrics.DISKS.shown(settings):
        assert value("granq_disk_free_bytes", {"volume": "artifacts"}) is None, "the folder is not there yet"
        (tmp_path / "store").mkdir()
        free, size = (value(f"granq_disk_{name}_bytes", {"volume": "artifacts"}) for name in ("free", "size"))
        assert free is not None
        assert size == os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
        assert 0 < free <= size
    assert value("granq_disk_free_bytes", {"volume": "artifacts"}) is None


class NvmlError(Exception):
    pass


def _unsupported(_handle: int) -> int:
    raise NvmlError


def test_gpus_are_shown_with_what_they_tell() -> None:
    nvml = SimpleNamespace(
        NVMLError=NvmlError,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index if index == 0 else _unsupported(index),
        nvmlDeviceGetName=lambda _handle: "NVIDIA H100",
        nvmlDeviceGetMemoryInfo=lambda _handle: SimpleNamespace(used=3, total=8),
        nvmlDeviceGetUtilizationRates=lambda _handle: SimpleNamespace(gpu=25),
        nvmlDeviceGetTemperature=lambda _handle, _sensor: 40,
        nvmlDeviceGetPowerUsage=_unsupported,
    )
    families: list[Metric] = list(GpuCollector(nvml).collect())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    assert found == {
        "granq_gpu_memory_used_bytes": 3,
        "granq_gpu_memory_size_bytes": 8,
        "granq_gpu_utilization_ratio": 0.25,
        "granq_gpu_temperature_celsius": 40,
    }
    assert all(s.labels == {"gpu": "0", "model": "NVIDIA H100"} for family in families for s in family.samples)


def test_a_machine_without_nvidia_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        NVMLError = NvmlError

        @staticmethod
        def nvmlInit() -> None:  # noqa: N802 - named so by the library
            raise NvmlError("NVML shared library not found")

    monkeypatch.setitem(sys.modules, "pynvml", Absent)
    metrics.show_gpus.__wrapped__()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if the package were not installed
    metrics.show_gpus.__wrapped__()
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("granq_gpu")]
