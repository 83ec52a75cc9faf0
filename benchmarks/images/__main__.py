"""Builds the images and runs each: `python -m benchmarks.images` (`make images-check`); needs root, takes minutes.

Buildah builds the real Dockerfile in a chroot, without a daemon; a Debian of the same release stands in for the base
image, which is not pulled. Then each image runs in namespaces of its own, with a read-only root, as its own user and
without capabilities, and must answer its own health check and end on SIGTERM with 0. What an image must not have
(compilers, PyTorch in the small ones) is looked for in its files.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.images.builder import Builder
from benchmarks.images.container import Container, ImageConfig
from benchmarks.results_table import Table

TARGETS = ("coordinator", "evaluator", "evaluator-rtx", "evaluator-tensorrt", "generator", "quantizer")
WITH_TORCH = ("generator", "quantizer")
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "make", "cmake", "ld", "as", "uv")
MIB = 1024 * 1024
HEALTHY_SECONDS = 300.0
# Without TLS a server refuses to listen beyond loopback unless it is told to; here it is alone in its network.
_ALONE = {"GRANQ_ALLOW_INSECURE": "true"}
COLUMNS = (
    "image",
    "MiB beside the base",
    "largest packages (MiB)",
    "PyTorch",
    "healthy after s",
    "server's memory MiB",
    "stopped after s",
)


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
            began = time.monotonic()
            code = container.stop()
        finally:
            container.stop(0)
        if code != 0:
            raise CheckError(f"{target} ended with {code} on SIGTERM:\n{container.log()}")
        (packages,) = root.glob("opt/granq/lib/python3*/site-packages")
        table.add(
            target,
            f"{size_bytes(root / 'opt/granq') / MIB:.0f}",
            largest(packages),
            "yes" if target in WITH_TORCH else "no",
            f"{healthy:.1f}",
            f"{memory / MIB:.0f}",
            f"{time.monotonic() - began:.1f}",
        )


def main() -> int:
    """Check the images that the arguments name; return 1 if one of them is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/granq-images"), help="for images and layers")  # noqa: S108
    parser.add_argument("--index", action="append", default=[], help="package index besides PyPI: URL or folder")
    parser.add_argument("--keep", action="store_true", help="leave the images, for the next run")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}")
    missing = [tool for tool in ("buildah", "mmdebstrap", "unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        parser.error(f"needs root and {', '.join(missing) or 'nothing else'}: tools/apt.sh buildah mmdebstrap iproute2")
    version = subprocess.run(["buildah", "--version"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607
    notes = [
        f"Built by {version}, isolation chroot, from deploy/docker/Dockerfile.",
        "Base: Debian bookworm with its Python 3.11 in place of python:3.11-slim-bookworm, which was not pulled.",
        "Run with a read-only root, uid 10001, no capabilities; healthy: the image's own HEALTHCHECK passes.",
    ]
    table = Table(options.out, "Images", COLUMNS, notes)
    builder = Builder(options.folder, options.index)
    builder.make_base()
    failed = 0
    for target in options.targets or TARGETS:
        try:
            check(builder, target, table)
        except (CheckError, RuntimeError) as error:
            print(f"{target}: {error}", file=sys.stderr)
            failed = 1
    if not options.keep:
        builder.remove()
    return failed


if __name__ == "__main__":
    sys.exit(main())
