"""`python -m benchmarks.bad_inputs` writes what each bad input was answered; exit code 1 if an answer is none."""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.bad_inputs import files, models, requests
from benchmarks.bad_inputs.bench import READ_MEMORY_BYTES, Answer, Bench, PeakMemory, running
from benchmarks.results_table import Table
from services.common.settings import MIB

_SHORT = 150
# What says that a server, not an input, is at fault.
_BAD = frozenset({"", "INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "exit 1"})


def _cases(folder: Path, marker: Path) -> Iterator[tuple[str, str, models.Ask]]:
    return chain(
        requests.cases(),
        models.cases(folder, marker),
        files.sets(folder, marker),
        files.graphs(),
        files.packages(folder),
    )


def fault_of(answer: Answer) -> str:
    """Return what is wrong with an answer; "" when nothing is."""
    if answer.code in _BAD:
        return answer.code or "taken"
    return "names no field" if answer.code == "INVALID_ARGUMENT" and not answer.field else ""


def _harm(bench: Bench, marker: Path) -> str:
    """Return what an input has done; "" when nothing."""
    if marker.exists():
        marker.unlink()
        return "code in the input ran"
    for name, server in bench.servers.items():
        if not psutil.pid_exists(server.pid) or psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE:
            return f"the {name} has ended"
    return ""


def _shown(text: str, folder: Path) -> str:
    line = " ".join(text.replace(str(folder), "…").replace("|", "/").split())
    return line if len(line) <= _SHORT else f"{line[: _SHORT - 1]}…"


def main() -> int:
    """Run as the command line says."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.bad_inputs", description=__doc__)
    arguments.add_argument(
        "--only", default="", help="inputs that have this in their name or the name of what they are sent to"
    )
    arguments.add_argument("--out", type=Path, help="Markdown file for the table")
    options = arguments.parse_args()
    table = Table(
        options.out,
        "Bad inputs",
        ["input", "sent to", "status", "reason", "field", "message", "peak of a process, MB"],
        [
            "Each input is sent to the four real servers, or given to the command that a device runs; all must stay "
            "alive, and code in an input must not run.",
            "Memory: the most that any process of a job, or of the command, held; 650 MB of it are PyTorch and what it "
            f"loads. Reading may take {READ_MEMORY_BYTES // MIB} MiB and six times the file's size more.",
        ],
    )
    failed = 0
    with TemporaryDirectory(prefix="granq-bad-") as name:
        folder, marker = Path(name), Path(name, "ran")
        with running(folder) as bench:
            before = bench.memory()
            for case, place, ask in _cases(folder, marker):
                if options.only not in f"{case}, {place}":
                    continue
                with PeakMemory(os.getpid(), without={server.pid for server in bench.servers.values()}) as peak:
                    answer = ask(bench)
                message = _shown(answer.message, folder)
                megabytes = f"{peak.bytes / 1e6:.0f}" if peak.bytes else "–"
                table.add(case, place, answer.code or "taken", answer.reason, answer.field, message, megabytes)
                if fault := _harm(bench, marker) or fault_of(answer):
                    failed += 1
                    sys.stderr.write(f"{case}: {fault}\n")
            after = bench.memory()
        for name in before:
            grown = f"{before[name] / 1e6:.0f} MB before all inputs, {after[name] / 1e6:.0f} MB after them"
            table.add("all of them", f"the {name}", "alive", "", "", grown, "–")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
