"""The main job, from a trained model to an engine: what `make demo` runs.

    python examples/fashion_mnist/demo.py --out demo-out

Starts the four servers in a temporary folder (`granq up`), submits the example ResNet-20 at W4A4 (`granq quantize`),
and ends with a table of what was measured on the 10000 test images and a folder with graphs, engine and report. Options
that this script does not know go to `granq quantize`, for example --epochs 2 --iterations 50.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dataset import NAME, find

MODEL = Path(__file__).parent / "resnet20.pt2"
# Enough for this small network, and minutes on two cores. Replay, because in so few iterations a student learns more
# from a finished synthetic set than beside a generator that is still learning.
EFFORT = ["--mode", "replay", "--synthesis-iterations", "500", "--images", "1536"]
EFFORT += ["--epochs", "3", "--iterations", "100", "--batch", "32"]
# As train.py prepares its images.
PREPROCESSING = ["--mean", "0.2860", "--std", "0.3530"]
GRANQ = [sys.executable, "-m", "granq.cli"]
STOP_SECONDS = 60


@contextmanager
def servers(data: Path, datasets: Path) -> Iterator[str]:
    """Run `granq up` for the length of the block; yields the coordinator's address.

    Raises:
        SystemExit: The servers did not come up; `granq up` has said why.
    """
    ready = data / "ready.json"
    command = ["up", "--data", str(data), "--port", "0", "--datasets", str(datasets), "--ready-file", str(ready)]
    print(f"$ granq {shlex.join(command)}", flush=True)
    # Its own process group: Ctrl-C ends this script, which then stops the servers in order.
    process = subprocess.Popen([*GRANQ, *command], start_new_session=True)  # noqa: S603 - fixed command
    try:
        while not ready.is_file():
            if process.poll() is not None:
                raise SystemExit(process.returncode)
            time.sleep(0.1)
        yield json.loads(ready.read_text("utf-8"))["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)


def main() -> int:
    """Return the exit code of `granq quantize`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the bundle")
    parser.add_argument("--data", type=Path, help="folder for the servers' data; default: temporary")
    options, extra = parser.parse_known_args()
    # Without this, SIGTERM would end this script alone and leave the servers.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    started = time.monotonic()
    datasets = find()
    with (
        TemporaryDirectory(prefix="granq-demo-") as scratch,
        servers((options.data or Path(scratch)).resolve(), datasets) as address,
    ):
        command = ["quantize", str(MODEL), "--weight-bits", "4", "--activation-bits", "4", *EFFORT]
        command += ["--dataset", NAME, "--dataset-format", "idx", "--split", "t10k", *PREPROCESSING]
        command += ["--address", address, "--out", str(options.out), *extra]
        print(f"$ granq {shlex.join(command)}", flush=True)
        try:
            code = subprocess.run([*GRANQ, *command], check=False).returncode  # noqa: S603 - the user's own options
        except KeyboardInterrupt:
            code = 130
    print(f"{time.monotonic() - started:.0f} s in all")
    return code


if __name__ == "__main__":
    sys.exit(main())
