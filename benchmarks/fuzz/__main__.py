"""`python -m benchmarks.fuzz` tries 100,000 inputs on each parser and prints a table; exit code 1 if one misbehaves."""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.fuzz.parsers import parsers
from benchmarks.fuzz.running import Findings, work
from benchmarks.results_table import Table

_MEMORY = Path("/dev/shm")  # noqa: S108 - only a folder with a name of its own is made there


def _fuzz(name: str, options: argparse.Namespace) -> Findings:
    with TemporaryDirectory(prefix="granq-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            try:
                return pool.submit(work, name, folder, options.seed, options.count, options.seconds).result()
            except BrokenProcessPool:
                kept = options.crashes / f"{''.join(c if c.isalnum() else '_' for c in name)}.input"
                kept.parent.mkdir(parents=True, exist_ok=True)
                last = Path(folder, "last")
                if not last.exists():
                    raise  # before the first input
                kept.write_bytes(last.read_bytes())
                return Findings(defects=[f"the process ended; its input is kept as {kept}"])


def main() -> int:
    """Run as the command line says."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    arguments.add_argument("--count", type=int, default=100_000, help="inputs for each parser")
    arguments.add_argument("--seconds", type=float, default=float("inf"), help="longest time for each parser")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", default="", help="parsers whose name has this in it")
    arguments.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="folder for inputs that crash")
    arguments.add_argument("--out", type=Path, help="Markdown file for the table")
    options = arguments.parse_args()
    table = Table(
        options.out,
        "Fuzzing of the parsers",
        [
            "parser",
            "inputs",
            "read",
            "refused",
            "kinds",
            "no memory",
            "slowest, CPU s",
            "defects",
        ],
        [
            "Valid inputs, changed in their bytes and within their structure; a defect is a crash, an error that is "
            "not ours, or more than 1 s of CPU time. Allocations beyond 1 GiB fail."
        ],
    )
    failed = False
    with TemporaryDirectory() as unused:
        names = [name for name, _ in parsers(Path(unused)) if options.only in name]
    for name in names:
        found = _fuzz(name, options)
        refused = sum(found.refused.values())
        table.add(
            name,
            found.inputs,
            found.accepted,
            refused,
            len(found.refused),
            found.no_memory,
            f"{found.slowest:.3f}",
            len(found.defects),
        )
        for defect in found.defects[:10]:
            sys.stderr.write(f"{name}: {defect}\n")
        failed |= bool(found.defects)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
