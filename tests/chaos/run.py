"""Chaos: pipelines while a seeded monkey kills, freezes, cuts off and fills up: `python -m tests.chaos.run --help`.

Ends with code 0 only if every pipeline succeeded or failed for what was injected, those that failed went on to their
end afterwards, artifacts are whole, weights equal an undisturbed run's, events have no gap or repeat, and nothing is
left behind.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from benchmarks.results_table import Table
from granq.v1 import coordinator_pb2
from tests.support.chaos import checks, rig
from tests.support.chaos.drive import Driven, drive, retry_failed
from tests.support.chaos.monkey import Monkey
from tests.support.chaos.supervised import until
from tests.support.postgres import postgres_server
from tests.support.proxy import Proxies

State = coordinator_pb2.PipelineState
_DISK_MIB = 48
_INSIDE = "GRANQ_CHAOS_OWN_MOUNTS"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", type=int, default=100, help="pipelines with scripted workers")
    parser.add_argument("--real", type=int, default=8, help="pipelines with the real workers, on tiny models")
    parser.add_argument("--at-once", type=int, default=6, help="scripted pipelines that run at once")
    parser.add_argument("--seconds", type=float, default=3600, help="time after which the run has failed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="one coordinator and one scripted worker")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--keep", type=Path, help="folder for files and logs; default: a temporary one, removed")
    return parser.parse_args()


def with_own_mounts() -> None:
    """Go on in a mount namespace of this run's own, where a small file system can be mounted, if that is allowed.

    It takes root: in a user namespace, PostgreSQL would refuse to run.
    """
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        return
    probe = [unshare, "--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        os.environ[_INSIDE] = "1"
        os.execv(unshare, [unshare, "--mount", sys.executable, "-m", "tests.chaos.run", *sys.argv[1:]])


def small_disk(folder: Path) -> Path | None:
    """Mount a small file system; None where that is not allowed."""
    if _INSIDE not in os.environ:
        return None
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "none", str(folder)]
    subprocess.run(mount, check=True)
    return folder


def verify(deployment: rig.Deployment, driven: list[Driven], reference: dict[int, str]) -> int:
    """Assert what must hold of pipelines that have ended; return how many artifacts were read."""
    artifacts = 0
    with deployment.client() as client:
        ids = {each.pipeline.pipeline_id for each in driven}
        listed = [pipeline.pipeline_id for pipeline in client.list()]
        assert len(listed) == len(driven) + len(reference), "a request made two pipelines, or one was lost"
        assert ids <= set(listed)
        for each in driven:
            pipeline = each.retried or each.pipeline
            assert pipeline.state == State.PIPELINE_STATE_SUCCEEDED, pipeline
            assert each.retried is None or checks.is_injected(each.pipeline), each.pipeline.failure
            assert pipeline.results.quantization.model.digest == reference[each.spec], pipeline.pipeline_id
            checks.check_events(client, pipeline)
            artifacts += checks.check_artifacts(deployment, pipeline)
    until(lambda: not _raises(deployment), 30, "no workflow or job is left in the database")
    return artifacts


def _raises(deployment: rig.Deployment) -> bool:
    try:
        checks.check_database(deployment)
    except AssertionError:
        return True
    return False


def undisturbed(deployment: rig.Deployment, seconds: float) -> dict[int, str]:
    """Run each spec once with nothing broken; return the digests of the weights."""
    runs = drive(deployment, len(deployment.specs), len(deployment.specs), "undisturbed", seconds)
    for each in runs:
        assert each.pipeline.state == State.PIPELINE_STATE_SUCCEEDED, each.pipeline.failure
    return {each.spec: each.pipeline.results.quantization.model.digest for each in runs}


def main() -> None:
    """Run, check, and print the table."""
    # PostgreSQL is started by a true fork, since it needs another account. gRPC's handlers for that crash this process
    # now and then while its threads are busy; they have no use here, where what is forked runs another program at once.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
    options = arguments()
    if _INSIDE not in os.environ:
        with_own_mounts()
    random, began = Random(options.seed), time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="granq-chaos-")))
        scratch = folder / "tmp"
        for each in (folder / "scripted", folder / "real", scratch):
            each.mkdir(parents=True)
        disk = small_disk(folder / "scripted" / "artifacts")
        if disk is not None:
            stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        postgres = stack.enter_context(postgres_server())
        os.environ["TMPDIR"] = str(scratch)  # of the servers, whose leftovers are looked for
        proxies = stack.enter_context(Proxies())
        small = options.small
        deployments = [stack.enter_context(rig.scripted(folder / "scripted", postgres, proxies, random, small=small))]
        counts = {id(deployments[0]): (options.pipelines, options.at_once)}
        if options.real:
            deployments.append(stack.enter_context(rig.real(folder / "real", postgres, proxies, random)))
            counts[id(deployments[1])] = (options.real, 2)
        references = [undisturbed(deployment, options.seconds) for deployment in deployments]
        monkey = Monkey(
            random=random,
            servers=[server for deployment in deployments for server in deployment.servers],
            proxies=[proxy for deployment in deployments for proxy in deployment.proxies],
            postgres=postgres,
            disk=disk,
            pause_seconds=(0.1, 0.5) if small else (0.2, 2.0),
            outage_seconds=(0.2, 1.0) if small else (0.3, 4.0),
        )
        monkey.start()
        try:
            driven = run_all(deployments, counts, options.seconds)
        finally:
            monkey.stop()
        for server in monkey.servers:
            server.wait_up(120)
        artifacts = 0
        for deployment, each, reference in zip(deployments, driven, references, strict=True):
            retry_failed(deployment, each, options.seconds)
            artifacts += verify(deployment, each, reference)
        restarts = sum(server.restarts for server in monkey.servers)
        codes = {s.server.name: s.stop() for d in deployments for s in reversed(d.servers)}
        assert not any(codes.values()), codes
        for deployment in deployments:
            checks.check_nothing_left(deployment, scratch)
        tell(options, monkey, driven, restarts, artifacts, time.monotonic() - began)


def run_all(
    deployments: list[rig.Deployment], counts: dict[int, tuple[int, int]], seconds: float
) -> list[list[Driven]]:
    """Drive the pipelines of all deployments at once."""
    pool = ThreadPoolExecutor(len(deployments))
    try:
        running = [pool.submit(drive, each, *counts[id(each)], "chaos", seconds) for each in deployments]
        return [each.result() for each in running]
    finally:
        pool.shutdown(wait=False)  # who ends the run must not wait for pipelines


def tell(
    options: argparse.Namespace,
    monkey: Monkey,
    driven: list[list[Driven]],
    restarts: int,
    artifacts: int,
    seconds: float,
) -> None:
    """Print and write the table."""
    names = ("scripted workers", "real workers, tiny models")
    notes = [
        "Pipelines while a seeded monkey breaks things, one after the other. All checks passed: each pipeline "
        "succeeded or failed for what was injected; after a retry with nothing broken all have succeeded; artifacts "
        "match their digests; weights equal an undisturbed run's; events are numbered without gap or repeat; no "
        "process, port or temporary file was left.",
        f"{seconds:.0f} s in all, seed {options.seed}. {restarts} restarts of servers, {artifacts} artifacts read.",
    ]
    table = Table(options.out, "Chaos", ["what", "count"], notes)
    for name, count in sorted(monkey.injected.items()):
        table.add(f"fault: {name}", count)
    for name, group in zip(names, driven, strict=False):
        outcomes = Counter(
            "succeeded" if each.retried is None else f"failed with {each.pipeline.failure.reason}, then succeeded"
            for each in group
        )
        table.add(f"pipelines: {name}", len(group))
        for outcome, count in sorted(outcomes.items()):
            table.add(f"— {outcome}", count)
        table.add("— of all, those with repeated attempts in their events", sum(e.interruptions > 0 for e in group))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and with it all that was started
    main()
