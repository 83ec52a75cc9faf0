"""Says in a file that a server is up and on which ports, for who started it with port 0."""

import json
import os
from pathlib import Path


def write_ready_file(path: Path, port: int, metrics_port: int) -> None:
    """Write {"port", "metrics_port", "pid"} as JSON; the file appears whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"port": port, "metrics_port": metrics_port, "pid": os.getpid()}) + "\n", "utf-8")
    temporary.replace(path)
