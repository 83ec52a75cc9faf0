"""Reads model files without running anything that is in them.

``torch.export.load`` is not used. In torch 2.14 it unpickles custom constants, pickled weights and sample inputs, and
it hands the symbolic shapes in ``models/*.json`` to ``sympy.sympify``, which evaluates them as Python. Here a ``.pt2``
is a zip of JSON and raw little-endian numbers: the JSON is parsed as data, the numbers are viewed as tensors, and
entries that could hold a pickle are refused by name or never opened.
"""

import json
import math
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch

from granq.v1 import common_pb2
from services.common.errors import InvalidArgumentError

FIELD: Final = "model.artifact"
MAX_ENTRIES: Final = 50_000
MAX_JSON_BYTES: Final = 256 * 1024 * 1024
MAX_FILE_BYTES: Final = 8 * 1024 * 1024 * 1024
_MAX_RANK: Final = 8

# Numbers of torch's serialized ScalarType that a model with float weights may hold.
DTYPES: Final = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


def refuse(reason: str, message: str, field: str = FIELD) -> InvalidArgumentError:
    """Return the error that refuses a model; the caller raises it."""
    return InvalidArgumentError(message, reason=reason, field=field)


def detect_format(path: Path) -> "common_pb2.ModelFormat":
    """Return the serialization of a model file, from its content alone.

    Raises:
        InvalidArgumentError: MODEL_TRUNCATED for an empty file or a zip without its directory, MODEL_FORMAT_UNKNOWN for
            anything that is none of the three formats.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
    if size == 0:
        raise refuse("MODEL_TRUNCATED", "the model file is empty")
    if head[:2] == b"PK":
        with open_zip(path) as archive:
            return _zip_format(archive)
    if len(head) > 8 and head[8:9] == b"{":
        return common_pb2.MODEL_FORMAT_SAFETENSORS
    if head[:1] == b"\x80":
        return common_pb2.MODEL_FORMAT_STATE_DICT
    raise refuse(
        "MODEL_FORMAT_UNKNOWN",
        "the file is neither a torch.export archive (.pt2), nor safetensors, nor a state dict written by torch.save",
    )


def _zip_format(archive: zipfile.ZipFile) -> "common_pb2.ModelFormat":
    names = {PurePosixPath(name).parts[1:] for name in archive.namelist()}
    if ("archive_format",) in names:
        return common_pb2.MODEL_FORMAT_TORCH_EXPORT
    if ("constants.pkl",) in names:
        raise refuse(
            "MODEL_FORMAT_UNKNOWN",
            "the file is a TorchScript archive; export the model with torch.export.export and torch.export.save",
        )
    if ("data.pkl",) in names:
        return common_pb2.MODEL_FORMAT_STATE_DICT
    if "serialized_exported_program.json" in archive.namelist():
        raise refuse(
            "MODEL_FORMAT_UNKNOWN",
            "the .pt2 was written by an old torch, whose archives hold pickles; save it again with torch 2.9 or newer",
        )
    raise refuse("MODEL_FORMAT_UNKNOWN", "the zip file is neither a torch.export archive nor a PyTorch state dict")


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip that PyTorch wrote, after checks that make it safe to read.

    PyTorch stores entries uncompressed. That is required here, so the entries together are never larger than the file:
    neither compressed nor overlapping zip bombs pass.

    Raises:
        InvalidArgumentError: MODEL_TRUNCATED, MODEL_TOO_LARGE or MODEL_ARCHIVE_INVALID.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise refuse("MODEL_TOO_LARGE", f"the model file has {size} bytes; at most {MAX_FILE_BYTES} are accepted")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise refuse(
            "MODEL_TRUNCATED", "the model file is cut off or damaged: its zip directory cannot be read"
        ) from error
    try:
        _check_entries(archive.infolist(), size)
    except InvalidArgumentError:
        archive.close()
        raise
    return archive


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    if not entries:
        raise refuse("MODEL_TRUNCATED", "the model archive has no entries")
    if len(entries) > MAX_ENTRIES:
        raise refuse("MODEL_ARCHIVE_INVALID", f"the model archive has {len(entries)} entries, more than {MAX_ENTRIES}")
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise refuse("MODEL_ARCHIVE_INVALID", "the model archive names an entry twice")
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        # orig_filename is what the file says; zipfile cuts filename at a NUL byte.
        if (
            entry.orig_filename.startswith("/")
            or ".." in parts
            or "\\" in entry.orig_filename
            or "\0" in entry.orig_filename
        ):
            raise refuse("MODEL_ARCHIVE_INVALID", f"the model archive has an unsafe entry name: {entry.filename!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise refuse(
                "MODEL_ARCHIVE_INVALID",
                f"entry {entry.filename!r} is compressed; torch stores entries uncompressed, so save the model again",
            )
        if entry.flag_bits & 0x1:
            raise refuse("MODEL_ARCHIVE_INVALID", f"entry {entry.filename!r} is encrypted")
    if sum(entry.file_size for entry in entries) > size:
        raise refuse("MODEL_ARCHIVE_INVALID", "the model archive declares more data than the file holds")


class Pt2Archive:
    """A ``.pt2`` file as data: the graph as parsed JSON and its tensors.

    Attributes:
        program: The content of ``models/<name>.json``.
        tensors: Weights, buffers and tensor constants by qualified name.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the archive.

        Raises:
            InvalidArgumentError: MODEL_TRUNCATED, MODEL_UNSAFE_PICKLE, MODEL_UNSAFE_CODE,
                MODEL_VERSION_UNSUPPORTED, MODEL_ARCHIVE_INVALID or MODEL_TOO_LARGE.
        """
        try:
            self._open(path)
        except (TypeError, LookupError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise refuse("MODEL_ARCHIVE_INVALID", "the .pt2 does not follow torch.export's schema") from error

    def _open(self, path: Path) -> None:
        with open_zip(path) as archive:
            self._archive = archive
            roots = {PurePosixPath(name).parts[0] for name in archive.namelist()}
            if len(roots) != 1:
                raise refuse("MODEL_ARCHIVE_INVALID", "the .pt2 archive must have one top folder")
            self._root = roots.pop()
            self._names = set(archive.namelist())
            self._check_header()
            model = self._model_name()
            self.program: dict[str, Any] = self._json(f"models/{model}.json")
            major = _get(_get(self.program, "schema_version"), "major")
            if major != 8:
                raise refuse(
                    "MODEL_VERSION_UNSUPPORTED",
                    f"the .pt2 has schema version {major}; version 8 is read, which torch 2.9 and newer write",
                )
            self.tensors = self._payload("weights", model) | self._payload("constants", model)
        del self._archive

    def _check_header(self) -> None:
        if self._read("archive_format", 16) != b"pt2":
            raise refuse("MODEL_FORMAT_UNKNOWN", "the archive does not say that it is a .pt2")
        version = self._read("archive_version", 16)
        if version != b"0":
            raise refuse("MODEL_VERSION_UNSUPPORTED", f"the .pt2 has archive version {version!r}; version 0 is read")
        if f"{self._root}/byteorder" in self._names and self._read("byteorder", 16) != b"little":
            raise refuse("MODEL_VERSION_UNSUPPORTED", "the .pt2 was written on a big-endian machine")
        if any(name.startswith(f"{self._root}/data/aotinductor/") for name in self._names):
            raise refuse(
                "MODEL_UNSAFE_CODE", "the .pt2 holds compiled code (AOTInductor); save the exported program alone"
            )

    def _model_name(self) -> str:
        prefix = f"{self._root}/models/"
        models = [name[len(prefix) : -5] for name in self._names if name.startswith(prefix) and name.endswith(".json")]
        if len(models) != 1:
            raise refuse("MODEL_ARCHIVE_INVALID", f"the .pt2 must hold one model, it holds {len(models)}")
        return models[0]

    def _read(self, name: str, limit: int) -> bytes:
        try:
            info = self._archive.getinfo(f"{self._root}/{name}")
        except KeyError:
            raise refuse("MODEL_TRUNCATED", f"the .pt2 lacks its entry {name!r}") from None
        if info.file_size > limit:
            raise refuse("MODEL_TOO_LARGE", f"entry {name!r} has {info.file_size} bytes; at most {limit} are accepted")
        try:
            return self._archive.read(info)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise refuse("MODEL_TRUNCATED", f"entry {name!r} of the .pt2 is damaged") from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(name, MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise refuse("MODEL_ARCHIVE_INVALID", f"entry {name!r} of the .pt2 is not valid JSON") from error
        if not isinstance(value, dict):
            raise refuse("MODEL_ARCHIVE_INVALID", f"entry {name!r} of the .pt2 is not an object")
        return value

    def _payload(self, kind: str, model: str) -> dict[str, torch.Tensor]:
        """Return the tensors of data/weights or data/constants."""
        if f"{self._root}/data/{kind}/{model}.pt" in self._names:
            raise refuse(
                "MODEL_UNSAFE_PICKLE",
                f"the .pt2 holds its {kind} as a pickle, which is never loaded; save it again with torch 2.9 or newer",
            )
        config = _get(self._json(f"data/{kind}/{model}_{kind}_config.json"), "config")
        if not isinstance(config, dict):
            raise refuse("MODEL_ARCHIVE_INVALID", f"the list of {kind} in the .pt2 is not an object")
        tensors: dict[str, torch.Tensor] = {}
        blobs: dict[str, bytearray] = {}
        for name, entry in config.items():
            path = _get(entry, "path_name")
            if not isinstance(path, str) or PurePosixPath(path).name != path:
                raise refuse("MODEL_ARCHIVE_INVALID", f"tensor {name!r} has an unsafe path {path!r}")
            if _get(entry, "use_pickle") is not False or not path.startswith(("weight_", "tensor_")):
                raise refuse(
                    "MODEL_UNSAFE_PICKLE",
                    f"constant {name!r} of the .pt2 is a pickled object, which could run code; pickles are never "
                    "loaded. Export a model whose constants are plain tensors",
                )
            if path not in blobs:
                blobs[path] = bytearray(self._read(f"data/{kind}/{path}", MAX_FILE_BYTES))
            tensors[name] = _view(name, blobs[path], _get(entry, "tensor_meta"))
        return tensors


def _get(value: Any, key: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise refuse("MODEL_ARCHIVE_INVALID", f"the .pt2's JSON lacks {key!r} where it must be")
    return value[key]


def _view(name: str, blob: bytearray, meta: Any) -> torch.Tensor:
    """Return a contiguous tensor of a raw payload; strides may alias or permute, as torch.export writes them."""
    dtype = DTYPES.get(_get(meta, "dtype"))
    if dtype is None:
        raise refuse("MODEL_ARCHIVE_INVALID", f"tensor {name!r} has an element type that is not supported")
    sizes = [_get(size, "as_int") for size in _get(meta, "sizes")]
    strides = [_get(stride, "as_int") for stride in _get(meta, "strides")]
    offset = _get(_get(meta, "storage_offset"), "as_int")
    numbers = [*sizes, *strides, offset]
    if len(sizes) != len(strides) or len(sizes) > _MAX_RANK or not all(type(n) is int and n >= 0 for n in numbers):
        raise refuse("MODEL_ARCHIVE_INVALID", f"tensor {name!r} has an invalid shape")
    count = len(blob) // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    # A stride of 0 could blow a small payload up; torch.export stores expanded weights that way, but no CNN has one.
    if math.prod(sizes) > max(count, 1) or (math.prod(sizes) > 0 and last >= count):
        raise refuse("MODEL_TRUNCATED", f"tensor {name!r} needs more data than the .pt2 holds for it")
    if math.prod(sizes) == 0:
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(blob, dtype=dtype, count=count)
    return torch.as_strided(flat, sizes, strides, offset).clone(memory_format=torch.contiguous_format)
