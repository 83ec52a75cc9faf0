"""Soak: back-to-back small pipelines for long, then a graceful stop under load: `python -m tests.soak.run --help`.

Ends with code 0 only if every pipeline succeeded, nothing that the servers use grew beyond retention, and all servers
stopped within their grace and went on after it.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

from benchmarks.results_table import Table
from granq.v1 import coordinator_pb2
from tests.support.chaos import checks, rig
from tests.support.chaos.drive import follow, insist
from tests.support.growth import MIB, Samples, sample
from tests.support.postgres import postgres_server
from tests.support.proxy import Proxies

State = coordinator_pb2.PipelineState
_RETENTION = {
    "retention_seconds": "30",
    "artifact_grace_seconds": "60",
    "upload_seconds": "86400",
    "tidy_seconds": "10",
}
# Beside the grace: closing the database, and a loaded machine.
_MORE_SECONDS = 10.0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the soak")
    parser.add_argument("--at-once", type=int, default=2, help="pipelines with scripted workers that run at once")
    parser.add_argument("--real", type=int, default=1, help="pipelines with real workers that run at once; 0: none")
    parser.add_argument("--sample-seconds", type=float, default=5.0, help="time between two samples")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--series", type=Path, help="file for all samples, as JSON")
    parser.add_argument("--keep", type=Path, help="folder for files and logs; default: a temporary one, removed")
    return parser.parse_args()


class Load:
    """Threads that submit one pipeline after the other, until told to end.

    Attributes:
        succeeded: How many pipelines have.
    """

    def __init__(self, deployment: rig.Deployment, at_once: int) -> None:
        self.succeeded = 0
        self.errors: list[BaseException] = []
        self._deployment = deployment
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(at_once)]
        for thread in self._threads:
            thread.start()

    def _run(self, worker: int) -> None:
        try:
            with self._deployment.client(worker) as client:
                specs = self._deployment.specs
                number = worker
                while not self._ending.is_set():
                    spec, number = specs[number % len(specs)], number + 1
                    deadline = time.monotonic() + 600
                    submitted = insist(lambda: client.submit(spec), deadline)  # noqa: B023
                    pipeline, _ = follow(client, submitted.pipeline_id, deadline)
                    assert pipeline.state == State.PIPELINE_STATE_SUCCEEDED, pipeline.failure
                    checks.check_artifacts(self._deployment, pipeline)
                    with self._lock:
                        self.succeeded += 1
        except BaseException as error:  # told by `check`
            self.errors.append(error)

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self.errors:
            raise self.errors[0]

    def end(self) -> None:
        """Submit no more, and wait for those that run."""
        self._ending.set()
        for thread in self._threads:
            thread.join(600)
            assert not thread.is_alive(), "a pipeline does not end"
        self.check()


def stop_under_load(deployments: list[rig.Deployment]) -> dict[str, float]:
    """Stop every server while pipelines run, start it again, and return how long each stop took."""
    took: dict[str, float] = {}
    for deployment in deployments:
        for supervised in reversed(deployment.servers):
            supervised.children()
            began = time.monotonic()
            code = supervised.stop()
            took[supervised.server.name] = time.monotonic() - began
            assert code == 0, f"{supervised.server.name} left with {code}"
            limit = rig.GRACE_SECONDS + _MORE_SECONDS
            assert took[supervised.server.name] < limit, f"{supervised.server.name} took longer than {limit} s to stop"
            supervised.server.start()
    return took


def main() -> None:
    """Run, judge, and print the table."""
    # PostgreSQL is started by a true fork, since it needs another account. gRPC's handlers for that crash this process
    # now and then while its threads are busy; they have no use here, where what is forked runs another program at once.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
    options, random = arguments(), Random(1)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="granq-soak-")))
        scratch = folder / "tmp"
        for each in (folder / "scripted", folder / "real", scratch):
            each.mkdir(parents=True)
        postgres = stack.enter_context(postgres_server())
        os.environ["TMPDIR"] = str(scratch)
        os.environ.update({f"GRANQ_{name.upper()}": value for name, value in _RETENTION.items()})
        proxies = stack.enter_context(Proxies())
        deployments = [stack.enter_context(rig.scripted(folder / "scripted", postgres, proxies, random, small=False))]
        loads = [(deployments[0], options.at_once)]
        if options.real:
            deployments.append(stack.enter_context(rig.real(folder / "real", postgres, proxies, random)))
            loads.append((deployments[1], options.real))
        began, samples = time.monotonic(), Samples()
        running = [Load(deployment, at_once) for deployment, at_once in loads]
        due = began
        while time.monotonic() - began < 60 * options.minutes:
            for deployment in deployments:
                sample(deployment, samples)
            for load in running:
                load.check()
            due += options.sample_seconds
            time.sleep(max(0.0, due - time.monotonic()))
        soaked = time.monotonic() - began
        if options.series is not None:
            samples.write(options.series)
        counts = [load.succeeded for load in running]
        took = stop_under_load(deployments)
        for load in running:
            load.end()
        for deployment in deployments:
            for supervised in deployment.servers:
                assert supervised.server.stop() == 0
            checks.check_nothing_left(deployment, scratch)
        tell(options, samples, soaked, counts, took)


def tell(
    options: argparse.Namespace, samples: Samples, seconds: float, counts: list[int], took: dict[str, float]
) -> None:
    """Print and write the table; end with code 1 where something grew."""
    verdicts = samples.verdicts()
    notes = [
        f"{seconds / 60:.1f} min of back-to-back small pipelines: {counts[0]} with scripted workers"
        + (f", {counts[1]} with the real ones on tiny models" if len(counts) > 1 else "")
        + ". All succeeded; each one's artifacts were read and matched their digests.",
        f"Retention in this run: pipelines {_RETENTION['retention_seconds']} s after their end, artifacts after "
        f"{_RETENTION['artifact_grace_seconds']} s.",
        "The second and the last third of the time; the first is the warm-up. Medians, but of memory the lower "
        "quartiles: gRPC's receive buffers of 4 MiB come and go. Processes of jobs are not counted: they end with "
        "their job.",
        "At the end each server was stopped by SIGTERM under load, left with code 0, and was started again; pipelines "
        "went on and succeeded. No process, port or temporary file was left.",
    ]
    table = Table(options.out, "Soak", ["what", "second third", "last third", "allowed"], notes)
    for verdict in sorted(verdicts, key=lambda each: each.name):
        scale = MIB if verdict.name.endswith("memory") else 1
        name = verdict.name + (", MiB" if scale == MIB else "")
        table.add(name, *(f"{value / scale:.1f}" for value in (verdict.before, verdict.after, verdict.allowed)))
    for server, time_taken in took.items():
        table.add(f"{server}: stop under load, s", "", f"{time_taken:.1f}", f"{rig.GRACE_SECONDS + _MORE_SECONDS:.0f}")
    grown = [verdict.name for verdict in verdicts if verdict.grew]
    if grown:
        sys.exit(f"grew: {', '.join(grown)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and with it all that was started
    main()
