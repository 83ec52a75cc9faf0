"""Says in a file that a server is up and on which ports, for who started it with port 0."""

import json
import os
from pathlib import Path


def write_ready_file(path: Path, port: int, metrics_port: int, health_port: int | None = None) -> None:
    """Write {"port", "metrics_port", "health_port", "pid"} as JSON; the file appears whole or not at all.

    Without a port for health alone, "health_port" is missing.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    ports = {"port": port, "metrics_port": metrics_port}
    if health_port is not None:
        ports["health_port"] = health_port
    temporary.write_text(json.dumps({**ports, "pid": os.getpid()}) + "\n", "utf-8")
    temporary.replace(path)
