"""Device packages: lossless, small, and safe to open whatever is in the file."""

import hashlib
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granq.v1 import packages_pb2
from services.common.errors import InternalError, InvalidArgumentError
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package import read_package, write_package
from services.common.package.container import HEADER_BYTES, Parts, from_file, to_file
from services.common.package.device_package import MAX_GRAPH_BYTES, parse_package
from tests.support.onnx_graphs import Builder

ABOUT = packages_pb2.PackageManifest(model_name="net", input_shape=[3, 8, 8], num_classes=5)


def files(largest_weight: int = 7, seed: int = 0) -> tuple[bytes, bytes]:
    trt = Builder(largest_weight=largest_weight, seed=seed).model()
    return trt.SerializeToString(), to_onnx_runtime(trt).SerializeToString()


@pytest.fixture(scope="module")
def package() -> bytes:
    return write_package(*files(), ABOUT)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 127), st.integers(0, 2**32))
def test_both_files_come_back_bit_for_bit(largest_weight: int, seed: int) -> None:
    trt, ort = files(largest_weight, seed)
    data = write_package(trt, ort, ABOUT)
    opened = parse_package(data)
    assert opened.rebuild_trt() == trt
    assert opened.rebuild_ort(trt) == ort
    assert opened.manifest.model_name == "net"
    assert {weight.bits for weight in opened.manifest.weights} <= set(
        range(2, max(2, largest_weight.bit_length() + 1) + 1)
    )


def test_a_file_that_repeats_itself_comes_back() -> None:
    # Equal and constant weights occur at several places of the file; any of them will do.
    model = Builder().model()
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_codes"):
            tensor.raw_data = bytes(len(tensor.raw_data))
    trt, ort = model.SerializeToString(), to_onnx_runtime(model).SerializeToString()
    opened = parse_package(write_package(trt, ort, ABOUT))
    assert opened.rebuild_trt() == trt
    assert len(opened.manifest.weights) == 3


def test_odd_codes_take_a_bit_less_and_are_told_by_the_version(package: bytes) -> None:
    model = Builder(two_bits=True).model()
    trt, ort = model.SerializeToString(), to_onnx_runtime(model).SerializeToString()
    data = write_package(trt, ort, ABOUT)
    opened = parse_package(data)
    assert [(weight.bits, weight.odd) for weight in opened.manifest.weights] == [(2, True)] * 3
    assert opened.rebuild_trt() == trt
    assert (data[8], package[8]) == (2, 1)
    lied = reframed(data, lambda manifest: setattr(manifest.weights[1], "odd", False))
    with pytest.raises(InvalidArgumentError, match="does not give"):
        parse_package(lied).rebuild_trt()


def test_equal_files_give_equal_packages(package: bytes) -> None:
    assert write_package(*files(), ABOUT) == package


def test_an_ort_file_that_does_not_follow_is_found_when_packing() -> None:
    trt, ort = files()
    with pytest.raises(InternalError, match="came out wrong"):
        write_package(trt, ort[:-1], ABOUT)


def test_a_package_cut_anywhere_is_refused(package: bytes) -> None:
    for length in range(len(package)):
        with pytest.raises(InvalidArgumentError, match="cut short"):
            parse_package(package[:length])


def test_bytes_behind_the_end_are_refused(package: bytes) -> None:
    for more in (b"\0", package):
        with pytest.raises(InvalidArgumentError, match="goes on behind its end"):
            parse_package(package + more)


def test_a_flipped_bit_anywhere_is_refused(package: bytes) -> None:
    random = np.random.default_rng(0)
    for place in range(len(package)):
        damaged = bytearray(package)
        damaged[place] ^= 1 << int(random.integers(8))
        with pytest.raises(InvalidArgumentError) as caught:
            parse_package(bytes(damaged))
        assert (caught.value.reason, caught.value.field) == ("PACKAGE_INVALID", "package")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_package(data)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"PK\x03\x04", "is none"),
        (8, b"\3\0\0\0", "version 3, and this software reads versions 1 to 2; update it"),
        (8, b"\0\0\0\0", "version 0, and this software reads versions 1 to 2; update it"),
        (12, b"\xff\xff\xff\xff", "manifest of 4294967295 bytes"),
        (16, b"\xff" * 8, "cut short"),
        (24, b"\xff" * 8, "cut short"),
    ],
)
def test_a_header_that_declares_anything_is_answered(package: bytes, place: int, value: bytes, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        parse_package(package[:place] + value + package[place + len(value) :])


def reframed(data: bytes, change: Callable[[packages_pb2.PackageManifest], object], **parts: bytes) -> bytes:
    """Return the package with another manifest and other parts, and the digest that belongs to them."""
    old = from_file(data)
    manifest = packages_pb2.PackageManifest.FromString(bytes(old.manifest))
    change(manifest)
    return to_file(
        Parts(manifest.SerializeToString(), parts.get("graph", bytes(old.graph)), parts.get("codes", bytes(old.codes)))
    )


def larger(manifest: packages_pb2.PackageManifest) -> None:
    manifest.graph_bytes = manifest.onnx_trt.size_bytes = MAX_GRAPH_BYTES


LIES: dict[str, tuple[Callable[[packages_pb2.PackageManifest], object], str]] = {
    "graph-huge": (lambda m: setattr(m, "graph_bytes", 1 << 60), "graph of 1152921504606846976 bytes"),
    "graph-negative": (lambda m: setattr(m, "graph_bytes", -1), "graph of -1 bytes"),
    "graph-and-file-larger": (larger, "do not make up"),
    "count-huge": (lambda m: setattr(m.weights[0], "count", 1 << 62), "other weights than it holds"),
    "count-negative": (lambda m: setattr(m.weights[0], "count", -5), "impossible size"),
    "count-zero": (lambda m: setattr(m.weights[0], "count", 0), "impossible size"),
    "bits-nine": (lambda m: setattr(m.weights[0], "bits", 9), "impossible size"),
    "bits-one": (lambda m: setattr(m.weights[0], "bits", 1), "impossible size"),
    "bits-other": (lambda m: setattr(m.weights[0], "bits", 5), "other weights than it holds"),
    "offset-negative": (lambda m: setattr(m.weights[0], "offset", -1), "impossible size"),
    "offset-huge": (lambda m: setattr(m.weights[2], "offset", 1 << 60), "do not make up"),
    "overlap": (lambda m: setattr(m.weights[1], "offset", m.weights[0].offset + 1), "overlap"),
    "none": (lambda m: m.ClearField("weights"), "other weights than it holds"),
    "file-huge": (lambda m: setattr(m.onnx_trt, "size_bytes", 1 << 60), "do not make up"),
    "file-negative": (lambda m: setattr(m.onnx_trt, "size_bytes", -1), "do not make up"),
}


@pytest.mark.parametrize("name", LIES)
def test_sizes_that_do_not_fit_together_are_refused(package: bytes, name: str) -> None:
    change, message = LIES[name]
    with pytest.raises(InvalidArgumentError, match=message):
        parse_package(reframed(package, change))


def test_a_place_that_is_not_the_weights_is_found_by_the_digest(package: bytes) -> None:
    moved = reframed(package, lambda m: setattr(m.weights[0], "offset", m.weights[0].offset - 1))
    with pytest.raises(InvalidArgumentError, match=r"does not give the 'model_trt.onnx'"):
        parse_package(moved).rebuild_trt()


@pytest.mark.parametrize("which", ["onnx_trt", "onnx_ort"])
def test_a_wrong_digest_is_refused(package: bytes, which: str) -> None:
    wrong = reframed(package, lambda m: setattr(getattr(m, which), "digest", "sha256:" + "0" * 64))
    opened = parse_package(wrong)
    with pytest.raises(InvalidArgumentError, match="that it promises"):
        opened.rebuild_ort(opened.rebuild_trt())


def test_a_manifest_that_is_no_message_is_refused(package: bytes) -> None:
    parts = from_file(package)
    with pytest.raises(InvalidArgumentError, match="no readable manifest"):
        parse_package(to_file(Parts(b"\xff" * 20, bytes(parts.graph), bytes(parts.codes))))


@pytest.mark.parametrize("bomb", [b"no deflate", zlib.compress(bytes(300 << 20)), zlib.compress(b"") + b"tail"])
def test_a_graph_that_inflates_to_something_else_takes_no_memory(package: bytes, bomb: bytes) -> None:
    opened = parse_package(reframed(package, lambda m: None, graph=bomb))
    tracemalloc.start()
    with pytest.raises(InvalidArgumentError, match="graph"):
        opened.rebuild_trt()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_size_declared_in_vain_takes_no_memory(package: bytes) -> None:
    def grow(manifest: packages_pb2.PackageManifest) -> None:
        manifest.onnx_trt.size_bytes += MAX_GRAPH_BYTES - manifest.graph_bytes
        manifest.graph_bytes = MAX_GRAPH_BYTES

    opened = parse_package(reframed(package, grow))
    tracemalloc.start()
    with pytest.raises(InvalidArgumentError, match="another size"):
        opened.rebuild_trt()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_graph_that_no_pipeline_exports_is_refused() -> None:
    trt, ort = files()
    model = onnx.load_model_from_string(trt)
    for node in model.graph.node:
        if node.op_type == "Mul":
            node.op_type = "Add"  # so that no factor follows the layer
    foreign = model.SerializeToString()
    with pytest.raises(InternalError, match="no pipeline exports"):
        write_package(foreign, ort, ABOUT)


def test_a_graph_of_any_bytes_is_rebuilt_or_refused(package: bytes) -> None:
    """Whoever knows the format can give damage a valid digest; so the graph's own reader has to bear it."""
    old = from_file(package)
    manifest = packages_pb2.PackageManifest.FromString(bytes(old.manifest))
    trt, _ = files()
    spans = [range(weight.offset, weight.offset + weight.count) for weight in manifest.weights]
    places = [place for place in range(len(trt)) if not any(place in span for span in spans)]
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        altered = bytearray(trt)
        altered[places[random.integers(len(places))]] = random.integers(256)
        manifest.onnx_trt.digest = f"sha256:{hashlib.sha256(altered).hexdigest()}"
        graph = zlib.compress(bytes(altered[place] for place in places))
        opened = parse_package(to_file(Parts(manifest.SerializeToString(), graph, bytes(old.codes))))
        assert opened.rebuild_trt() == altered
        try:
            opened.rebuild_ort(bytes(altered))
            outcomes.add("rebuilt")
        except InvalidArgumentError as error:
            outcomes.add(" ".join(error.message.split()[:5]))
    assert {"not a readable ONNX file:", "the device package holds a", "the device package does not"} <= outcomes


@pytest.mark.parametrize("bound", [-1e30, 1e9, float("nan"), float("inf")])
def test_codes_without_bounds_are_refused(bound: float) -> None:
    trt, ort = files()
    model = onnx.load_model_from_string(trt)
    low = next(t for t in model.graph.initializer if t.name == "low")
    low.raw_data = np.float32(bound).tobytes()
    with pytest.raises(InternalError, match="no pipeline exports"):
        write_package(model.SerializeToString(), ort, ABOUT)


def test_a_graph_that_names_other_files_is_refused() -> None:
    trt, ort = files()
    model = onnx.load_model_from_string(trt)
    bias = next(t for t in model.graph.initializer if t.name == "conv1_bias")
    bias.ClearField("raw_data")
    bias.data_location = onnx.TensorProto.EXTERNAL
    bias.external_data.add(key="location", value="../../etc/passwd")
    with pytest.raises(InternalError, match="keeps weights in other files"):
        write_package(model.SerializeToString(), ort, ABOUT)


def test_a_file_is_measured_before_it_is_read(tmp_path: Path, package: bytes) -> None:
    path = tmp_path / "net.granq"
    path.write_bytes(package)
    assert read_package(path).manifest.num_classes == 5
    with path.open("r+b") as file:
        file.truncate(5 << 30)  # sparse
    with pytest.raises(InvalidArgumentError, match="5368709120 bytes"):
        read_package(path)
    with pytest.raises(FileNotFoundError):
        read_package(tmp_path / "absent")


def test_the_header_is_as_documented(package: bytes) -> None:
    assert package[:8] == b"\x89GranQ\r\n"
    assert HEADER_BYTES == 64
    sizes = [int.from_bytes(package[a:b], "little") for a, b in ((8, 12), (12, 16), (16, 24), (24, 32))]
    assert sizes[0] == 1
    assert HEADER_BYTES + sum(sizes[1:]) == len(package)
