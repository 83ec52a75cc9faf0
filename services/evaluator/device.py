"""What happens on a device: the graphs come out of the package again, and an engine is built of them here.

Needs numpy and onnx (extra "device"), no PyTorch, no server, and no ONNX Runtime.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf.json_format import MessageToJson

from granq.v1 import artifacts_pb2, common_pb2, packages_pb2, reports_pb2
from services.common.errors import ResourceExhaustedError
from services.common.package import DevicePackage
from services.evaluator.building import build_plan
from services.evaluator.graph import load_graph
from services.evaluator.manifest import to_json

TRT, ORT, MANIFEST = "model_trt.onnx", "model_ort.onnx", "package.json"
ENGINE, ENGINE_MANIFEST = "model.engine", "model.engine.json"


@dataclass(frozen=True)
class Report:
    """Where a build on a device says what it does; an engine build is followed by it as by a job.

    Attributes:
        say: Takes a line for people.
    """

    say: Callable[[str], None]

    @property
    def log(self) -> "Report":
        """Itself: it has the methods that builds use of a logger."""
        return self

    def report(self, phase: str, step: int = 0, total: int = 0) -> None:
        """Tell each phase when it begins."""
        if step == 0:
            self.say(f"engine: {phase}")

    def check_cancelled(self) -> None:
        """Go on: Ctrl-C ends the whole process."""

    def info(self, event: str, **fields: Any) -> None:
        """Tell an event and what belongs to it."""
        self.say(": ".join((event, ", ".join(f"{name} {value}" for name, value in fields.items()))))

    warning = error = info


def rebuild(package: DevicePackage, folder: Path, say: Callable[[str], None]) -> None:
    """Write both ONNX files and the manifest (package.json) into a folder; all of them, or none.

    Args:
        package: The package.
        folder: Where; files of an earlier build are replaced.
        say: Takes a line for people for each file.

    Raises:
        InvalidArgumentError: The package does not give the files that it promises, or they are no classifier.
        ResourceExhaustedError: The disk is full.
        OSError: The folder cannot be written.
    """
    trt = package.rebuild_trt()
    files = {TRT: trt, ORT: package.rebuild_ort(trt), MANIFEST: _json(package.manifest)}
    with _staging(folder) as staged:
        for name, data in files.items():
            Path(staged, name).write_bytes(data)
        # The digests hold; what is left to see is whether the graphs are what the runtimes are to be given.
        for name in (TRT, ORT):
            load_graph(staged / name, "package")
        for name in files:
            _publish(staged / name, folder)
    for name, artifact in ((TRT, package.manifest.onnx_trt), (ORT, package.manifest.onnx_ort)):
        say(f"{folder / name}: {artifact.size_bytes:,} bytes, {artifact.digest}, as exported")


def build_engine(
    package: DevicePackage, folder: Path, target: common_pb2.EngineTarget, seconds: float, report: Report
) -> reports_pb2.EngineManifest:
    """Build an engine from the graph that `rebuild` wrote, audit it, and write it with its manifest beside the graph.

    Args:
        package: The package.
        folder: What `rebuild` was given.
        target: What to build for.
        seconds: Time after which the build has failed.
        report: Told how far it is.

    Raises:
        FailedPreconditionError: The runtime is missing, failed or warned, or a convolution came out in float.
        InvalidArgumentError: The graph cannot be parsed, or the target is impossible.
        ResourceExhaustedError: The build took too long, or the disk is full.
        UnavailableError: The build's process died.
        OSError: The folder cannot be written.
    """
    with _staging(folder) as staged:
        plan = staged / ENGINE
        built = build_plan(folder / TRT, "package", target, plan, report, seconds)
        with plan.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        engine = artifacts_pb2.Artifact(digest=f"sha256:{digest}", size_bytes=plan.stat().st_size, name=ENGINE)
        manifest = built.manifest(engine, package.manifest.onnx_trt.digest)
        (staged / ENGINE_MANIFEST).write_bytes(to_json(manifest))
        for name in (ENGINE, ENGINE_MANIFEST):
            _publish(staged / name, folder)
    for found in built.audit.floats if built.audit else ():
        report.say(f"engine: {found.layer.name} ({found.layer.kind}) runs in floating point: {found.reason}")
    layers = f"; {built.audit.int8} of {built.audit.total} layers in INT8" if built.audit else ""
    report.say(
        f"{folder / ENGINE}: {engine.size_bytes:,} bytes, {built.runtime.module} {built.outcome.version}{layers}"
    )
    return manifest


def _json(manifest: packages_pb2.PackageManifest) -> bytes:
    return MessageToJson(manifest, preserving_proto_field_name=True).encode() + b"\n"


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Give a folder on the same file system, so that files can be moved into place whole; it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".granq-", dir=folder) as staged:
            yield Path(staged)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhaustedError(f"the disk with {folder} is full", reason="DISK_FULL") from error
        raise


def _publish(path: Path, folder: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # a device may lose its power at any time
    path.replace(folder / path.name)
