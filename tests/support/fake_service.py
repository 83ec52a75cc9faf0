"""Stands in for one of the four services under `granq up`: health, ready file, and a death on demand.

It is copied to services/<name>/__main__.py of a folder that PYTHONPATH puts first. A file GRANQ_FAKE/<name>.die ends it
with the exit code in that file, at once or while it runs; GRANQ_FAKE/<name>.child makes it leave a child process.
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

NAME = Path(__file__).parent.name
CONTROL = Path(os.environ["GRANQ_FAKE"])


def same(message: bytes) -> bytes:
    return message


def main() -> None:
    # Taken where it is waited for, and however often it comes: it comes twice when a supervisor with threads dies.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    record = {key: value for key, value in os.environ.items() if key.startswith("GRANQ_")}
    with (CONTROL / f"{NAME}.starts").open("a") as starts:
        starts.write(json.dumps(record | {"pid": os.getpid()}) + "\n")
    death = CONTROL / f"{NAME}.die"
    if death.exists():
        sys.stderr.write("cannot open the database\n")
        sys.exit(int(death.read_text()))
    if (CONTROL / f"{NAME}.child").exists():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (CONTROL / f"{NAME}.child").write_text(str(child.pid))
    server = grpc.server(ThreadPoolExecutor(1))
    check = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01", same, same)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})])
    port = server.add_insecure_port(f"127.0.0.1:{os.environ['GRANQ_PORT']}")
    server.start()
    ready = Path(os.environ["GRANQ_READY_FILE"])
    ready.with_suffix(".tmp").write_text(json.dumps({"port": port, "metrics_port": port}))
    ready.with_suffix(".tmp").replace(ready)
    signal.sigwait({signal.SIGTERM})
    server.stop(0).wait()
    (CONTROL / f"{NAME}.stopped").write_text("gracefully")


if __name__ == "__main__":
    main()
