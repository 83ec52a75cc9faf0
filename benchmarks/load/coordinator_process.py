"""A coordinator for which the name "workers" means several loopback addresses: it stands for a cluster's name server.

`WORKERS=4 python -m benchmarks.load.coordinator_process`
"""

import os
import socket
from typing import Any

from services.common.rpc import run
from services.coordinator.server import create_server
from services.coordinator.settings import CoordinatorSettings

NAME = "workers"


def addresses(count: int) -> list[str]:
    """Return that many loopback addresses."""
    return [f"127.0.0.{number}" for number in range(1, count + 1)]


def main() -> None:
    """Serve as the coordinator does."""
    found = addresses(int(os.environ["WORKERS"]))
    ask = socket.getaddrinfo

    def answer(host: Any, port: Any, *arguments: Any, **named: Any) -> list[Any]:
        hosts = found if host == NAME else [host]
        return [entry for one in hosts for entry in ask(one, port, *arguments, **named)]

    vars(socket)["getaddrinfo"] = answer
    run("coordinator", CoordinatorSettings(), create_server)


if __name__ == "__main__":
    main()
