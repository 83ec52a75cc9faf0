"""Writes and reads device packages.

A package holds the ``trt`` ONNX file cut in two: the weights' codes, packed at their own bit widths, and everything
else, deflated. Joining them gives the file back to the last bit; the ``ort`` file follows from it by the rewrite that
made it in the first place. Sizes that a package declares are checked before memory is taken for them: whatever it says,
reading takes no more than a few times its file's size and `MAX_GRAPH_BYTES`.
"""

import hashlib
import importlib.metadata
import os
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from granq.v1 import artifacts_pb2, packages_pb2
from services.common.errors import InternalError, InvalidArgumentError
from services.common.onnx_files import parse_onnx
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package.bits import MAX_BITS, MIN_BITS, bits_for, pack, packed_size, unpack
from services.common.package.container import (
    FIRST_VERSION,
    MAX_PACKAGE_BYTES,
    VERSION,
    Parts,
    from_file,
    refuse,
    to_file,
)

MEDIA_TYPE = "application/vnd.granq.package"
MAX_GRAPH_BYTES = 64 << 20
"""Largest graph without codes, inflated."""
_MAX_ONNX_BYTES = (1 << 31) - 1  # protobuf reads no more
# Fewer codes than this cost more in the manifest than packing them saves.
_FEWEST_CODES = 32


class DevicePackage:
    """A package whose parts were checked and fit together.

    Attributes:
        manifest: What it says about itself.
    """

    def __init__(self, manifest: packages_pb2.PackageManifest, graph: memoryview, codes: memoryview) -> None:
        self.manifest = manifest
        self._graph = graph
        self._codes = codes

    def rebuild_trt(self) -> bytes:
        """Return the ``trt`` ONNX file, bit for bit as it was packed.

        Raises:
            InvalidArgumentError: What comes out is not what the manifest promises.
        """
        rest = memoryview(_inflate(self._graph, self.manifest.graph_bytes))
        result = bytearray(self.manifest.onnx_trt.size_bytes)
        end = taken = at = 0
        for weight in self.manifest.weights:
            gap = weight.offset - end
            result[end : weight.offset] = rest[taken : taken + gap]
            taken, end = taken + gap, weight.offset
            size = packed_size(weight.count, weight.bits)
            for part in unpack(self._codes[at : at + size], weight.bits, weight.count):
                codes = part << 1 | 1 if weight.odd else part
                result[end : end + part.size] = codes.tobytes()
                end += part.size
            at += size
        result[end:] = rest[taken:]
        return _checked(bytes(result), self.manifest.onnx_trt)

    def rebuild_ort(self, trt: bytes) -> bytes:
        """Return the ``ort`` ONNX file, bit for bit as the pipeline made it.

        Args:
            trt: What `rebuild_trt` returned.

        Raises:
            InvalidArgumentError: What comes out is not what the manifest promises, or the graph is not one of ours.
        """
        model = parse_onnx(trt, "package")
        try:
            result: bytes = to_onnx_runtime(model).SerializeToString()
        except (
            # What reading a graph can meet that its author did not mean to be read; found by fuzzing.
            *(ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError),
            *(onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
        ) as error:
            refuse(f"holds a graph that no pipeline exports: {error}")
        versions = f"; the package was made by {self.manifest.producer!r}, and this is {_producer()}"
        return _checked(result, self.manifest.onnx_ort, versions)


def write_package(trt: bytes, ort: bytes, about: packages_pb2.PackageManifest) -> bytes:
    """Return a package's file, after a look at whether it reads back as what went in.

    Args:
        trt: ONNX file for TensorRT, as the export wrote it.
        ort: ONNX file for ONNX Runtime that was made of it.
        about: Model, input, preprocessing and layers; what concerns the files is filled in here.

    Raises:
        InvalidArgumentError: The graph is larger than packages may hold.
        InternalError: The ``ort`` file cannot be had from the ``trt`` file again.
    """
    manifest = packages_pb2.PackageManifest()
    manifest.CopyFrom(about)
    manifest.producer = _producer()
    manifest.onnx_trt.CopyFrom(_artifact(trt, "model_trt.onnx"))
    manifest.onnx_ort.CopyFrom(_artifact(ort, "model_ort.onnx"))
    rest, packed, end = [], [], 0
    for name, raw in _codes_in(trt):
        codes = np.frombuffer(raw, np.int8)
        # Wherever these bytes are found is right: the same bytes are put back at the same place.
        offset = trt.index(raw, end)
        odd = bool((codes & 1).all())
        stored = codes >> 1 if odd else codes
        weight = manifest.weights.add(tensor=name, bits=bits_for(stored), count=len(raw), offset=offset, odd=odd)
        rest.append(trt[end:offset])
        packed.append(pack(stored, weight.bits))
        end = offset + len(raw)
    graph = b"".join((*rest, trt[end:]))
    manifest.graph_bytes = len(graph)
    data = to_file(
        Parts(manifest.SerializeToString(deterministic=True), zlib.compress(graph, 9), b"".join(packed)),
        VERSION if any(weight.odd for weight in manifest.weights) else FIRST_VERSION,
    )
    package = parse_package(data)
    try:
        package.rebuild_ort(package.rebuild_trt())
    except InvalidArgumentError as error:
        raise InternalError(f"a device package came out wrong: {error.message}") from error
    return data


def read_package(path: Path) -> DevicePackage:
    """Return the package in a file.

    Raises:
        InvalidArgumentError: It is no package, damaged, of another version, or larger than is read (1 GiB).
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_PACKAGE_BYTES:
            refuse(f"has {size} bytes; at most {MAX_PACKAGE_BYTES} are read")
        data = file.read(size)
    return parse_package(data)


def parse_package(data: bytes) -> DevicePackage:
    """Return the package in the bytes of a file; raises InvalidArgumentError as `read_package`."""
    parts = from_file(data)
    try:
        manifest = packages_pb2.PackageManifest.FromString(bytes(parts.manifest))
    except DecodeError:
        refuse("has no readable manifest")
    _check_sizes(manifest, len(parts.codes))
    return DevicePackage(manifest, memoryview(parts.graph), memoryview(parts.codes))


def _check_sizes(manifest: packages_pb2.PackageManifest, codes_bytes: int) -> None:
    """Refuse a manifest whose parts cannot fit together."""
    weights = manifest.weights
    if not 0 <= manifest.graph_bytes <= MAX_GRAPH_BYTES:
        refuse(f"declares a graph of {manifest.graph_bytes} bytes; at most {MAX_GRAPH_BYTES} are read")
    if not all(MIN_BITS <= w.bits <= MAX_BITS and w.count > 0 and w.offset >= 0 for w in weights):
        refuse("declares weights of an impossible size")
    if sum(packed_size(w.count, w.bits) for w in weights) != codes_bytes:
        refuse("declares other weights than it holds")
    if any(after.offset < before.offset + before.count for before, after in pairwise(weights)):
        refuse("declares weights that overlap")
    # Together with the three above, this bounds all that follows by the file's own size.
    size = manifest.onnx_trt.size_bytes
    end = weights[-1].offset + weights[-1].count if weights else 0
    if size != manifest.graph_bytes + sum(w.count for w in weights) or not end <= size <= _MAX_ONNX_BYTES:
        refuse("declares a graph and weights that do not make up its ONNX file")


def _inflate(data: memoryview, size: int) -> bytes:
    """Return exactly ``size`` bytes; never holds more than one more, whatever the data would expand to."""
    inflater = zlib.decompressobj()
    try:
        # zlib allocates as it goes, so that a size that was declared in vain takes no memory.
        result = inflater.decompress(data, size + 1)
    except zlib.error:
        refuse("holds a graph that cannot be inflated")
    if len(result) != size or not inflater.eof or inflater.unused_data:
        refuse("holds a graph of another size than it declares")
    return result


def _codes_in(trt: bytes) -> list[tuple[str, bytes]]:
    """Return name and codes of the weights, in the order of the file."""
    initializers = onnx.load_model_from_string(trt).graph.initializer
    return [
        (tensor.name, tensor.raw_data)
        for tensor in initializers
        if tensor.data_type == TensorProto.INT8 and len(tensor.raw_data) >= _FEWEST_CODES
    ]


def _artifact(data: bytes, name: str) -> artifacts_pb2.Artifact:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return artifacts_pb2.Artifact(digest=digest, size_bytes=len(data), name=name, media_type="application/onnx")


def _checked(data: bytes, promised: artifacts_pb2.Artifact, note: str = "") -> bytes:
    made = _artifact(data, promised.name)
    if (made.digest, made.size_bytes) != (promised.digest, promised.size_bytes):
        refuse(f"does not give the {promised.name!r} that it promises: {made.digest}, not {promised.digest!r}{note}")
    return data


def _producer() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("granq-pipeline", "onnx"))
