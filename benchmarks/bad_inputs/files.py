"""Labelled sets, graphs and device packages that nobody should get far with."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.bad_inputs.bench import Answer, Bench
from benchmarks.bad_inputs.models import PLACE, Ask
from granq.v1 import artifacts_pb2, common_pb2, packages_pb2
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package import write_package
from services.common.package.container import Parts, from_file, to_file
from tests.support import hostile_graphs, hostile_sets
from tests.support.disks import on_a_small_disk
from tests.support.onnx_graphs import images, quantized
from tests.support.pt2 import Payload
from tests.support.servers import ServerProcess

EVALUATE, BUILD, DEVICE = "StartEvaluate", "StartBuildEngine", "granq device build"
RTX = common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT_RTX)


def _dataset(path: str, kind: str = "NPZ") -> common_pb2.Dataset:
    return common_pb2.Dataset(path=path, format=f"DATASET_FORMAT_{kind}")


def _npz(root: Path, **arrays: object) -> common_pb2.Dataset:
    np.savez(root / "set.npz", **arrays)  # type: ignore[arg-type]
    return _dataset("set.npz")


def _bytes(root: Path, name: str, data: bytes, kind: str = "NPZ") -> common_pb2.Dataset:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    return _dataset(name if kind in ("NPZ", "WEBDATASET") else str(Path(name).parent), kind)


def _tar(root: Path, name: str, kind: bytes) -> common_pb2.Dataset:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    return _bytes(root, "set.tar", buffer.getvalue(), "WEBDATASET")


def _link(root: Path) -> common_pb2.Dataset:
    (root / "link.npz").symlink_to("/etc/hostname")
    return _dataset("link.npz")


def _cut_gzip(root: Path) -> common_pb2.Dataset:
    head = struct.pack(">BBBB3I", 0, 0, 8, 3, 3, 8, 8) + os.urandom(3 * 64)
    _bytes(root, "cut/x-labels-idx1-ubyte", struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes(3))
    return _bytes(root, "cut/x-images-idx3-ubyte.gz", gzip.compress(head)[:-40], "IDX")


def sets(root: Path, marker: Path) -> Iterator[tuple[str, str, Ask]]:
    """Yield labelled sets, written below the dataset root, as `models.cases` does."""
    good, labels = images(4), np.zeros(4, int)
    made: list[tuple[str, Callable[[], common_pb2.Dataset]]] = [
        ("NumPy archive that declares 3 TB", lambda: hostile_sets.declares_much(root)),
        ("NumPy archive, 8 images of 42 MB in 0.4 MB", lambda: hostile_sets.many_large(root)),
        ("NumPy archive, one image of 42 MB, not resized", lambda: hostile_sets.one_large(root)),
        (
            "NumPy archive with objects (a pickle with code)",
            lambda: _npz(root, images=np.array([Payload(marker)]), labels=labels[:1]),
        ),
        ("NumPy archive with NaN", lambda: _npz(root, images=good * np.float32("nan"), labels=labels)),
        ("NumPy archive without labels", lambda: _npz(root, images=good)),
        ("NumPy archive of float64", lambda: _npz(root, images=good.astype(np.float64), labels=labels)),
        ("labels beyond the model's classes", lambda: _npz(root, images=good, labels=labels + 5)),
        ("images of another size than the model's", lambda: _npz(root, images=good[..., :4], labels=labels)),
        ("set of no bytes", lambda: _bytes(root, "empty.npz", b"")),
        ("IDX, gzip that expands to 64 MiB behind 3 images", lambda: hostile_sets.expands(root)),
        ("IDX, truncated gzip", lambda: _cut_gzip(root)),
        ("PNG that declares 10 gigapixels", lambda: hostile_sets.picture(root)),
        ("tar, member ../a.png", lambda: _tar(root, "../a.png", tarfile.REGTYPE)),
        ("tar, link to /etc/passwd", lambda: _tar(root, "a.png", tarfile.SYMTYPE)),
        (
            "CIFAR, Python file with code",
            lambda: _bytes(root, "cifar/test_batch", pickle.dumps({"data": Payload(marker)}), "CIFAR"),
        ),
        ("path ../..", lambda: _dataset("../..", "IMAGE_FOLDER")),
        ("path /etc", lambda: _dataset("/etc", "IMAGE_FOLDER")),
        ("link out of the dataset root", lambda: _link(root)),
    ]

    def sent(dataset: common_pb2.Dataset) -> Ask:
        return lambda bench: bench.evaluate(onnx_float=_put(bench, quantized().SerializeToString()), dataset=dataset)

    for name, make in made:
        yield name, EVALUATE, sent(make())
    yield (
        "synthetic set, random bytes",
        EVALUATE,
        lambda bench: bench.evaluate(
            onnx_float=_put(bench, quantized().SerializeToString()), synthetic_set=_put(bench, os.urandom(999))
        ),
    )


def _put(bench: Bench, data: bytes) -> artifacts_pb2.Artifact:
    return bench.store.put_bytes(data)


def _changed_on_disk(bench: Bench) -> artifacts_pb2.Artifact:
    """Store a graph, and flip one of its bits behind the store's back."""
    artifact = _put(bench, quantized(seed=1).SerializeToString())
    path = bench.store.local_path(artifact.digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    return artifact


def _on_full_disk(bench: Bench) -> Answer:
    """Build on another evaluator, whose folder for temporary files is a disk of 320 KiB."""
    disk, folder = bench.folder / "full", bench.folder / "other"
    for made in (disk, folder):
        made.mkdir()
    prefix = [*on_a_small_disk(disk), "env", f"TMPDIR={disk}"]
    bench.servers["small"] = ServerProcess("evaluator", folder, prefix=prefix, artifact_url=bench.store.url).start()
    try:
        return bench.build("small", onnx_trt=_put(bench, quantized().SerializeToString()), target=RTX)
    finally:
        bench.servers.pop("small").stop()


def graphs() -> Iterator[tuple[str, str, Ask]]:
    """Yield graphs and engine targets, as `models.cases` does."""
    absent = artifacts_pb2.Artifact(digest="sha256:" + "0" * 64)

    def evaluated(data: bytes) -> Ask:
        return lambda bench: bench.evaluate(
            onnx_float=_put(bench, data), dataset=_npz(bench.folder, images=images(4), labels=np.zeros(4, int))
        )

    def built(data: bytes, target: common_pb2.EngineTarget = RTX) -> Ask:
        return lambda bench: bench.build(onnx_trt=_put(bench, data), target=target)

    good = quantized().SerializeToString()
    named = {
        "ONNX, truncated": hostile_graphs.truncated(quantized()),
        "ONNX, unknown operation": hostile_graphs.unknown(quantized()),
        "ONNX, weights in ../../etc/passwd": hostile_graphs.outside(quantized()),
        "ONNX of no bytes": b"",
    }
    for name, data in named.items():
        yield name, EVALUATE, evaluated(data)
    for name, data in (named | {"ONNX, a convolution in float": hostile_graphs.float_weights(quantized())}).items():
        yield name, BUILD, built(data)
    yield "graph with a digest that nothing has", BUILD, lambda bench: bench.build(onnx_trt=absent, target=RTX)
    yield (
        "graph, one bit flipped in the store",
        BUILD,
        lambda bench: bench.build(onnx_trt=_changed_on_disk(bench), target=RTX),
    )
    for batch in ((8, 4, 2), (0, 1, 2), (1, 8, 5000)):
        profile = common_pb2.BatchProfile(min=batch[0], opt=batch[1], max=batch[2])
        target = common_pb2.EngineTarget(runtime=RTX.runtime, batch=profile)
        yield f"batch profile {batch[0]}/{batch[1]}/{batch[2]}", BUILD, built(good, target)
    for name, target in (
        ("absent runtime (TensorRT)", common_pb2.EngineTarget(runtime=common_pb2.RUNTIME_TENSORRT)),
        ("compute capability 1.0", common_pb2.EngineTarget(runtime=RTX.runtime, compute_capabilities=["1.0"])),
    ):
        yield name, BUILD, built(good, target)
    yield "disk full during the build", BUILD, _on_full_disk


def _device(package: Path) -> Answer:
    """Run the command of a device on a package; the process that builds is below the one that runs it."""
    command = [sys.executable, "-m", "granq.cli", "device", "build", str(package), "--out", f"{package}.out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    message = (done.stderr.strip().splitlines() or [""])[-1]
    return Answer(f"exit {done.returncode}" if done.returncode else "", message=message)


def packages(folder: Path) -> Iterator[tuple[str, str, Ask]]:
    """Yield device packages, as `models.cases` does."""
    trt = quantized()
    ort = to_onnx_runtime(trt).SerializeToString()
    good = write_package(trt.SerializeToString(), ort, packages_pb2.PackageManifest(model_name="net"))
    parts = from_file(good)

    def reframed(change: Callable[[packages_pb2.PackageManifest], object], graph: bytes = bytes(parts.graph)) -> bytes:
        manifest = packages_pb2.PackageManifest.FromString(bytes(parts.manifest))
        change(manifest)
        return to_file(Parts(manifest.SerializeToString(), graph, bytes(parts.codes)))

    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    made = {
        "package, truncated": good[:-100],
        "package, one bit flipped": bytes(flipped),
        "package, digest of the graph wrong": reframed(lambda m: setattr(m.onnx_trt, "digest", "sha256:" + "0" * 64)),
        "package, graph that inflates to 300 MiB": reframed(lambda _: None, zlib.compress(bytes(300 << 20))),
        "package, weights declared as 4 EiB": reframed(lambda m: setattr(m.weights[0], "count", 1 << 62)),
        "package, weights of 9 bits": reframed(lambda m: setattr(m.weights[0], "bits", 9)),
        "package, bytes behind the end": good + bytes(9),
        "package of no bytes": b"",
    }

    def sent(path: Path) -> Ask:
        return lambda bench: _device(path)

    for number, (name, data) in enumerate(made.items()):
        path = folder / f"{number}.granq"
        path.write_bytes(data)
        yield name, DEVICE, sent(path)
    path = folder / "model.granq"
    path.write_bytes(good)
    yield "device package as the model", PLACE, lambda bench: bench.model(path)
