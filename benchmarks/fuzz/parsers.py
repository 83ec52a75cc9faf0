"""The parsers of files and messages from outside, with valid inputs and the errors by which they may refuse others."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from google.protobuf.message import DecodeError
from safetensors.torch import save

from benchmarks.fuzz import seeds
from benchmarks.fuzz.mutation import Mutate, in_bytes, in_json, in_text, in_zip, one_of
from granq import recipes, targets
from granq.engines.files import find_engines
from granq.v1 import common_pb2, coordinator_pb2, packages_pb2
from services.common.datasets import open_dataset
from services.common.datasets.plain_pickle import PlainPickleError, load_plain
from services.common.errors import GranqError
from services.common.models import load_model
from services.common.models.archive import detect_format
from services.common.models.weights import check_numbers, read_state_dict
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package.container import Parts, from_file, to_file
from services.common.package.device_package import parse_package, write_package
from services.common.rpc.validation import validate
from services.common.tensors import from_tensor, to_tensor
from services.coordinator.validation import check_spec
from services.evaluator.graph import load_graph
from services.quantizer.batches import read_synthetic_set
from tests.support import cifar_files
from tests.support.models import Residual, settle
from tests.support.onnx_graphs import Builder
from tests.support.pt2 import export


@dataclass(frozen=True)
class Parser:
    """What is fuzzed.

    Attributes:
        seeds: Valid inputs.
        mutate: Makes a hostile input of a valid one.
        parse: Reads an input as the services or the command do.
        errors: How an input may be refused; anything else is a defect.
    """

    seeds: list[bytes]
    mutate: Mutate
    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = (GranqError,)


class _Stored:
    """An artifact store that holds one file under every name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def local_path(self, _digest: str) -> Path:
        return self._path

    def stat(self, digest: str) -> Any:
        return common_pb2.ModelSource(artifact={"digest": digest, "size_bytes": 1}).artifact


def _written(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return parse


def _read_weights(path: Path) -> None:
    found = detect_format(path)
    if found != common_pb2.MODEL_FORMAT_TORCH_EXPORT:
        check_numbers(read_state_dict(path, found))


def _graph(path: Path) -> None:
    load_graph(path, "onnx_float")


def _package(data: bytes) -> None:
    package = parse_package(data)
    package.rebuild_ort(package.rebuild_trt())


def _reframed(data: bytes, rng: Any) -> bytes:
    """Return a package with one part changed and the digest that then is right."""
    old = from_file(data)
    parts = [bytes(old.manifest), bytes(old.graph), bytes(old.codes)]
    chosen = rng.choice((0, 0, 1, 2))
    if chosen == 0 and rng.random() < 0.7:
        manifest = packages_pb2.PackageManifest.FromString(parts[0])
        weight = rng.choice(manifest.weights)
        where, names = rng.choice(((weight, ("bits", "count", "offset")), (manifest, ("graph_bytes",))))
        setattr(where, rng.choice(names), rng.choice((0, 1, 2, 8, 9, 100, 2**31, 2**62, -1, -(2**40))) % 2**31)
        parts[0] = manifest.SerializeToString()
    else:
        parts[chosen] = in_bytes(parts[chosen], rng)
    return to_file(Parts(*parts))


def _dataset(folder: Path, kind: str, name: str) -> Callable[[bytes], object]:
    """Return a reader of a set, one of whose files is the input."""
    message = common_pb2.Dataset(path="set", format=f"DATASET_FORMAT_{kind}")
    message.preprocessing.channels = 3
    root = folder / kind
    if kind == "NPZ":
        message.path = f"set/{name}"

    def read(_path: Path) -> None:
        data = open_dataset(message, root, cast("Any", None))
        data.require((3, 32, 32) if kind == "CIFAR" else (3, 4, 4), 10)
        for _ in data.images(4):
            pass

    path = root / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return _written(path, read)


def _request(data: bytes) -> None:
    request = coordinator_pb2.SubmitPipelineRequest.FromString(data)
    validate(request)
    check_spec(request.spec, cast("Any", _Stored(Path())))


def _tensor(data: bytes) -> None:
    from_tensor(common_pb2.Tensor.FromString(data), "images")


def _manifest(folder: Path) -> Parser:
    engine = folder / "engine" / "model.engine"
    engine.parent.mkdir()
    engine.write_bytes(b"plan")
    valid = {
        "runtime": "RUNTIME_TENSORRT",
        "engine": {"digest": "sha256:" + "0" * 64},
        "layers": [{"name": "a"}],
        "inputs": [],
    }
    parse = _written(engine.with_suffix(".engine.json"), lambda _: find_engines(engine))
    return Parser([json.dumps(valid).encode()], one_of(in_bytes, in_json), parse, (ValueError, OSError))


def _in_pt2(name: str) -> Mutate:
    return one_of(in_json, in_json, in_bytes) if name.endswith(".json") else in_bytes


def parsers(folder: Path) -> Iterator[tuple[str, Callable[[], Parser]]]:
    """Yield name and maker of each parser; makers write their files below the folder, which should be in memory."""

    def model() -> Parser:
        seed = export(settle(Residual()), (3, 8, 8), folder / "seed.pt2").read_bytes()
        source = common_pb2.ModelSource(artifact={"digest": "sha256:" + "0" * 64})
        parse = _written(folder / "model.pt2", lambda path: load_model(source, cast("Any", _Stored(path))))
        return Parser([seed], one_of(in_bytes, in_zip(_in_pt2), in_zip(_in_pt2)), parse)

    def weights(seeds: list[bytes], mutate: Mutate) -> Parser:
        return Parser(seeds, mutate, _written(folder / "weights", _read_weights))

    def onnx() -> Parser:
        seed = Builder().model().SerializeToString()
        return Parser([seed], in_bytes, _written(folder / "graph.onnx", _graph))

    def package() -> Parser:
        packages = []
        for two_bits in (False, True):
            trt = Builder(two_bits=two_bits).model()
            ort = to_onnx_runtime(trt).SerializeToString()
            about = packages_pb2.PackageManifest(model_name="net")
            packages.append(write_package(trt.SerializeToString(), ort, about))
        return Parser(packages, one_of(in_bytes, _reframed, _reframed, _reframed), _package)

    def idx() -> Parser:
        labels = folder / "IDX" / "set" / "x-labels-idx1-ubyte"
        labels.parent.mkdir(parents=True)
        labels.write_bytes(struct.pack(">HBBI", 0, 8, 1, 3) + bytes(3))
        seed = struct.pack(">HBBIII", 0, 8, 3, 3, 4, 4) + bytes(48)
        return Parser([seed], in_bytes, _dataset(folder, "IDX", "x-images-idx3-ubyte"))

    def synthetic() -> Parser:
        tensors = {"images": torch.zeros(4, 3, 4, 4), "labels": torch.zeros(4).long(), "logits": torch.zeros(4, 10)}
        parse = _written(folder / "set", lambda path: read_synthetic_set(path, (3, 4, 4), 10))
        return Parser([save(tensors)], in_bytes, parse)

    zipped = [seeds.saved(seeds.state(), zipped=True), seeds.saved({"state_dict": seeds.state()}, zipped=True)]
    yaml = ["deployable/default", "simulated/cifar10-resnet20-w3a3"]
    yield "torch.export program (.pt2)", model
    yield "state dict, zip", lambda: weights(zipped, one_of(in_bytes, in_zip(lambda _: in_bytes)))
    yield "state dict, plain pickle", lambda: weights([seeds.saved(seeds.state(), zipped=False)], in_bytes)
    yield "safetensors weights", lambda: weights([save(seeds.state())], in_bytes)
    yield "synthetic set", synthetic
    yield "ONNX graph", onnx
    yield "device package (.granq)", package
    yield "IDX images", idx
    yield (
        "NumPy archive",
        lambda: Parser(
            [seeds.npz(False), seeds.npz(True)],
            one_of(in_bytes, in_zip(lambda _: in_bytes)),
            _dataset(folder, "NPZ", "x.npz"),
        ),
    )
    yield "CIFAR, binary", lambda: Parser([seeds.cifar(folder)], in_bytes, _dataset(folder, "CIFAR", "test_batch.bin"))
    yield (
        "CIFAR, Python",
        lambda: Parser(
            [cifar_files.python2(*cifar_files.images_and_labels(2, 10), key="labels")],
            in_bytes,
            load_plain,
            (PlainPickleError,),
        ),
    )
    pictures = ("PNG", "JPEG", "BMP", "WEBP", "PPM")
    yield (
        "image folder",
        lambda: Parser(
            [seeds.picture(form) for form in pictures], in_bytes, _dataset(folder, "IMAGE_FOLDER", "dog/a.png")
        ),
    )
    yield "WebDataset shard", lambda: Parser([seeds.shard()], in_bytes, _dataset(folder, "WEBDATASET", "a.tar"))
    yield (
        "recipe (YAML)",
        lambda: Parser(
            [recipes.read(name).encode() for name in yaml],
            in_text,
            lambda data: recipes.parse(data.decode("utf-8", "replace"), "x.yaml"),
            (ValueError,),
        ),
    )
    yield (
        "target (YAML)",
        lambda: Parser(
            [targets.read("jetson-orin-nano").encode()],
            in_text,
            lambda data: targets.parse(data.decode("utf-8", "replace"), "x.yaml"),
            (ValueError,),
        ),
    )
    yield "pipeline request (protobuf)", lambda: Parser([seeds.spec()], in_bytes, _request, (GranqError, DecodeError))
    yield (
        "tensor (protobuf)",
        lambda: Parser(
            [to_tensor(np.zeros((2, 3), np.float32)).SerializeToString()],
            in_bytes,
            _tensor,
            (GranqError, DecodeError),
        ),
    )
    yield "engine manifest (JSON)", lambda: _manifest(folder)
