"""The pool's metrics."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from granq import targets
from granq.v1.devices_pb2 import DeviceState

Counts = tuple[Mapping[int, int], Mapping[str, int]]


class DeviceCollector(Collector):
    """Counts devices by state, and the jobs that wait for one, at the moment of a scrape.

    Coordinators that share a database all show the same devices, and each the jobs of its own pipelines.

    Args:
        counts: Returns how many devices are in each state, and how many jobs wait by the name of their target; called
            from the metrics server's thread.
    """

    def __init__(self, counts: Callable[[], Counts]) -> None:
        self._counts = counts
        # Anybody may name a target: names that are not shipped are counted together, so that series stay bounded.
        self._targets = targets.names()

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics without values."""
        yield GaugeMetricFamily("granq_devices", "Devices of the pool by state.", labels=["state"])
        yield GaugeMetricFamily(
            "granq_device_queue_depth",
            "Jobs that wait for a device, by the shipped target that they are for; all other targets are other.",
            labels=["target_kind"],
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the metrics as they are now."""
        states, waiting = self._counts()
        by_state, queue = self.describe()
        for state in DeviceState.values():
            if state != DeviceState.DEVICE_STATE_UNSPECIFIED:
                name = DeviceState.Name(state).removeprefix("DEVICE_STATE_").lower()
                by_state.add_metric([name], states.get(state, 0))
        for target in self._targets:
            queue.add_metric([target], waiting.get(target, 0))
        queue.add_metric(["other"], sum(count for name, count in waiting.items() if name not in self._targets))
        yield from (by_state, queue)

    def register(self) -> None:
        """Let scrapes see the metrics."""
        REGISTRY.register(self)

    def unregister(self) -> None:
        """Take the metrics back."""
        REGISTRY.unregister(self)
