"""Which services run locally, what they need of each other, and the settings each one gets."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

METRICS_OFFSET = 1000


@dataclass(frozen=True)
class Service:
    """One service: its name, its default port above the first one, and the services whose addresses it is told."""

    name: str
    offset: int
    needs: tuple[str, ...] = ()


SERVICES = (
    Service("coordinator", 0, ("generator", "quantizer", "evaluator")),
    Service("generator", 1),
    Service("quantizer", 2, ("generator",)),
    Service("evaluator", 3),
)


@dataclass(frozen=True)
class Plan:
    """How the services of one `granq up` are laid out.

    Attributes:
        data: Folder for artifacts, caches, database, logs.
        host: Address to bind, and under which the services find each other.
        port: Port of the coordinator; the others follow. 0: the system chooses every port.
        datasets: Folder below which labelled sets are found by path.
    """

    data: Path
    datasets: Path
    host: str = "127.0.0.1"
    port: int = 50050

    def ports(self, service: Service) -> tuple[int, int]:
        """Return the gRPC port and the metrics port to ask for."""
        if self.port == 0:
            return 0, 0
        return self.port + service.offset, self.port + service.offset + METRICS_OFFSET

    def ready_file(self, service: Service) -> Path:
        """Return the file in which the service writes its bound ports once it serves."""
        return self.data / "run" / f"{service.name}.json"

    def log_file(self, service: Service) -> Path:
        """Return the file that takes the service's output."""
        return self.data / "logs" / f"{service.name}.log"

    def environment(self, service: Service, bound: tuple[int, int], addresses: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a service's process.

        Args:
            service: The service.
            bound: Its gRPC and metrics ports; after a restart those of before, so that the others still find it.
            addresses: Addresses of the services that it needs, by name.
        """
        settings = {
            "HOST": self.host,
            "PORT": str(bound[0]),
            "METRICS_PORT": str(bound[1]),
            "ARTIFACT_URL": (self.data / "artifacts").as_uri(),
            "CACHE_DIR": str(self.data / "cache" / service.name),
            "READY_FILE": str(self.ready_file(service)),
            "DATASET_ROOT": str(self.datasets),
        }
        if service.name == "coordinator":
            settings["DATABASE_URL"] = f"sqlite:///{self.data / 'coordinator.sqlite'}"
        settings |= {f"{need.upper()}_ADDRESS": addresses[need] for need in service.needs}
        return os.environ | {f"GRANQ_{key}": value for key, value in settings.items()}
