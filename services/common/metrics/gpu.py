"""GPUs of this machine, as NVIDIA's management library (NVML) tells of them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.common.logs import get_logger

_log = get_logger(__name__)
_FAMILIES = {
    "granq_gpu_memory_used_bytes": "Memory of the GPU in use, by whichever process.",
    "granq_gpu_memory_size_bytes": "Memory of the GPU.",
    "granq_gpu_utilization_ratio": "Share of the last moment, 0 to 1, in which a kernel ran.",
    "granq_gpu_temperature_celsius": "Temperature of the GPU.",
    "granq_gpu_power_watts": "Power that the GPU draws.",
}


class GpuCollector(Collector):
    """Reads NVML when Prometheus asks.

    Args:
        nvml: The module `pynvml`, initialized.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics without values."""
        for name, meaning in _FAMILIES.items():
            yield GaugeMetricFamily(name, meaning, labels=["gpu", "model"])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics as they are now; what a GPU does not tell is left out."""
        nvml = self._nvml
        families = list(self.describe())
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                labels = [str(index), str(nvml.nvmlDeviceGetName(handle))]
            except nvml.NVMLError:
                continue  # fell off the bus, or belongs to others
            for family, read in zip(families, self._readers(handle), strict=True):
                try:
                    family.add_metric(labels, read())
                except nvml.NVMLError:
                    continue  # such as the power of a virtual GPU
        yield from families

    def _readers(self, handle: Any) -> tuple[Callable[[], float], ...]:
        nvml = self._nvml
        return (
            lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        )


@cache
def show_gpus() -> None:
    """Show this machine's GPUs; none without a driver, or without the package nvidia-ml-py (the extra "gpu")."""
    try:
        import pynvml
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
        REGISTRY.register(GpuCollector(pynvml))
    except pynvml.NVMLError as error:
        _log.debug("no GPU metrics", cause=str(error))
