"""Builds the images and runs each: `python -m benchmarks.images` (`make images-check`); needs root, takes minutes.

Buildah builds the real Dockerfiles in a chroot, without a daemon; a Debian of the same release stands in for the base
image, which is not pulled; stand_ins.py has what stands in for NVIDIA's parts. Then each image runs in namespaces of
its own, with a read-only root, as its own user and without capabilities, and must answer its own health check and end
on SIGTERM with 0. What an image must not have (compilers, PyTorch in the small ones) is looked for in its files. Those
with TensorRT are asked for engines, and must refuse by what is missing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.images.builder import JETSON, Builder, dockerfile
from benchmarks.images.container import Container, ImageConfig
from benchmarks.results_table import ROOT, Table

TARGETS = ("coordinator", "evaluator", "evaluator-rtx", "evaluator-tensorrt", JETSON, "generator", "quantizer")
WITH_TENSORRT = ("evaluator-tensorrt", JETSON)
WITH_TORCH = ("generator", "quantizer")
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "make", "cmake", "ld", "as", "uv")
ADDED = ("opt/granq", "opt/python")
"""What images have beside their base; the latter only where the base's Python is too old."""
MIB = 1024 * 1024
HEALTHY_SECONDS = 300.0
# Without TLS a server refuses to listen beyond loopback unless it is told to; here it is alone in its network.
_ALONE = {"GRANQ_ALLOW_INSECURE": "true"}
STAND_INS = {
    "evaluator-tensorrt": "evaluator-tensorrt: all instructions run. `tensorrt`, `tensorrt-cu13` and the bindings are "
    "PyPI's, but `tensorrt-cu13-libs` is an empty wheel, since PyPI's fetches the libraries from NVIDIA's index, "
    "which is out of reach: the size lacks them.",
    JETSON: "evaluator-jetson: x86-64 in place of arm64, and Debian bookworm in place of both bases, l4t-tensorrt "
    "without TensorRT. The stage `bindings` is replaced, since its sources could not be cloned: its wheel holds "
    "NVIDIA's x86-64 bindings of the same release, from PyPI. `uv python install` unpacks Debian's Python 3.11 "
    "in place of 3.12; the size counts it. All other instructions run.",
}
"""What stands in for NVIDIA's parts of an image."""
COLUMNS = (
    "image",
    "MiB beside the base",
    "largest packages (MiB)",
    "PyTorch",
    "healthy after s",
    "server's memory MiB",
    "stopped after s",
)
# Told of images with TensorRT, besides.
ANSWERS = ("TensorRT listed", "asked for an engine's measurement", "asked for an engine's build", "import tensorrt")
_ASK = Path(__file__).with_name("ask_engine.py")


class CheckError(Exception):
    """An image is not as it has to be."""


def size_bytes(folder: Path) -> int:
    """Return the bytes that the files of a folder hold."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def largest(packages: Path, count: int = 3) -> str:
    """Return the names and sizes of the largest packages of a site-packages folder."""
    sizes = sorted(((size_bytes(entry), entry.name) for entry in packages.iterdir() if entry.is_dir()), reverse=True)
    return ", ".join(f"{name} {size / MIB:.0f}" for size, name in sizes[:count])


def check_files(target: str, root: Path, config: ImageConfig) -> None:
    """Look for what must not be in an image.

    Raises:
        CheckError: It is there.
    """
    folders = [root / folder.lstrip("/") for folder in config.environment["PATH"].split(":")]
    found = [str(folder / name) for folder in folders for name in COMPILERS if (folder / name).exists()]
    if found:
        raise CheckError(f"{target} has {', '.join(found)}")
    torch = list(root.glob("opt/granq/lib/python3*/site-packages/torch"))
    if bool(torch) != (target in WITH_TORCH):
        raise CheckError(f"{target}: PyTorch is {'there' if torch else 'missing'}")
    if not config.user.replace(":", "").isdigit() or config.user.startswith("0"):
        raise CheckError(f"{target} runs as {config.user!r}")


def check_rights(container: Container) -> None:
    """Try from within what must fail.

    Raises:
        CheckError: It does not.
    """
    attempt = "import os, sys; print(os.getuid()); open(sys.argv[1], 'w')"
    for path, writable in (("/opt/granq/x", False), ("/etc/x", False), ("/tmp/x", True), ("/data/x", True)):  # noqa: S108
        run = container.run("python", "-c", attempt, path)
        if (run.returncode == 0) != writable or run.stdout.strip() != "10001":
            raise CheckError(f"writing to {path}: {run.returncode}, {run.stdout}{run.stderr}")


def ask_for_engine(container: Container) -> list[str]:
    """Ask the evaluator for what takes a GPU and TensorRT's libraries, neither of which the container has.

    Returns:
        The cells of the columns ANSWERS.

    Raises:
        CheckError: An answer is not a refusal that names what is missing.
    """
    run = container.run("python", "-c", _ASK.read_text())
    if run.returncode:
        raise CheckError(f"asking for an engine:\n{run.stderr}{container.log()}")
    told = json.loads(run.stdout)
    for answer in (told["measure"], told["build"]):
        if not answer.startswith("FAILED_PRECONDITION: ") or "GPU" not in answer:
            raise CheckError(f"asked for an engine, it answers {answer!r}")
    loaded = container.run("python", "-c", "import tensorrt")
    reason = loaded.stderr.strip().splitlines()[-1] if loaded.returncode else "loaded"
    if not re.search(r"\blibnv\w+\.so\.\d+: cannot open shared object file", reason):
        raise CheckError(f"import tensorrt: {loaded.returncode}, {loaded.stderr}")
    return [told["version"], told["measure"], told["build"], reason]


def check(builder: Builder, target: str, table: Table) -> None:
    """Build, inspect and run one image, and add its row.

    Raises:
        CheckError: It is not as it has to be.
        RuntimeError: It could not be built, or did not start.
    """
    image = builder.build(target)
    config = builder.config(image)
    with builder.mounted(image) as root, tempfile.TemporaryDirectory(prefix="granq-image-") as scratch:
        check_files(target, root, config)
        data = Path(scratch, "data")
        data.mkdir()
        os.chown(data, *(int(part) for part in config.user.split(":")))
        container = Container(root, config, data, Path(scratch, "log"), _ALONE)
        try:
            healthy = container.wait_healthy(HEALTHY_SECONDS)
            memory = container.memory_bytes()
            check_rights(container)
            answers = ask_for_engine(container) if target in WITH_TENSORRT else []
            began = time.monotonic()
            code = container.stop()
        finally:
            container.stop(0)
        if code != 0:
            raise CheckError(f"{target} ended with {code} on SIGTERM:\n{container.log()}")
        (packages,) = root.glob("opt/granq/lib/python3*/site-packages")
        table.add(
            target,
            f"{sum(size_bytes(root / folder) for folder in ADDED) / MIB:.0f}",
            largest(packages),
            "yes" if target in WITH_TORCH else "no",
            f"{healthy:.1f}",
            f"{memory / MIB:.0f}",
            f"{time.monotonic() - began:.1f}",
            *answers,
        )


def check_all(builder: Builder, targets: Sequence[str], out: Path | None, append: bool) -> int:
    """Check images that share a table, and return 1 if one of them is not as it has to be."""
    version = subprocess.run(["buildah", "--version"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607
    files = sorted({str(dockerfile(target).relative_to(ROOT)) for target in targets})
    tensorrt = targets[0] in WITH_TENSORRT
    notes = [
        f"Built by {version}, isolation chroot, from {' and '.join(files)}.",
        "Base: Debian bookworm with its Python 3.11 in place of python:3.11-slim-bookworm, which was not pulled.",
        "Run with a read-only root, uid 10001, no capabilities; healthy: the image's own HEALTHCHECK passes.",
        *(STAND_INS[target] for target in targets if target in STAND_INS),
    ]
    title, columns = ("Images with TensorRT", (*COLUMNS, *ANSWERS)) if tensorrt else ("Images", COLUMNS)
    table = Table(out, title, columns, notes, append=append)
    failed = 0
    for target in targets:
        try:
            check(builder, target, table)
        except (CheckError, RuntimeError) as error:
            print(f"{target}: {error}", file=sys.stderr)
            failed = 1
    return failed


def main() -> int:
    """Check the images that the arguments name; return 1 if one of them is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/granq-images"), help="for images and layers")  # noqa: S108
    parser.add_argument("--index", action="append", default=[], help="package index besides PyPI: URL or folder")
    parser.add_argument("--keep", action="store_true", help="leave the images, for the next run")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--append", action="store_true", help="add the table to what the file has")
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    missing = [tool for tool in ("buildah", "mmdebstrap", "unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        parser.error(f"needs root and {', '.join(missing) or 'nothing else'}: tools/apt.sh buildah mmdebstrap iproute2")
    targets = options.targets or list(TARGETS)
    builder = Builder(options.folder, options.index)
    builder.make_bases(targets)
    groups = [[target for target in targets if (target in WITH_TENSORRT) == nvidia] for nvidia in (False, True)]
    failed = 0
    append = options.append
    for group in filter(None, groups):
        failed |= check_all(builder, group, options.out, append)
        append = True
    if not options.keep:
        builder.remove()
    return failed


if __name__ == "__main__":
    sys.exit(main())
