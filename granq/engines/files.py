"""Finds engines and their manifests: an engine, a manifest, a bundle, or the folder that a bundle was unpacked into."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from google.protobuf.json_format import Parse, ParseError

from granq.transfer import digest_of
from granq.v1 import reports_pb2

ENGINE, MANIFEST = ".engine", ".json"
_MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class EngineFile:
    """An engine with its manifest.

    Attributes:
        name: Where it is, for people.
        manifest: What it is.
        intact: Whether the engine is the one that the manifest describes; None where only the manifest is there.
    """

    name: str
    manifest: reports_pb2.EngineManifest
    intact: bool | None


def find_engines(path: Path) -> list[EngineFile]:
    """Return the engines that a path leads to: a bundle or a folder may hold several.

    Raises:
        ValueError: There is no engine, no manifest to it, or a file that is damaged.
        OSError: A file cannot be read.
    """
    if path.is_dir():
        found = list(_in_folder(path))
    elif zipfile.is_zipfile(path):
        found = list(_in_bundle(path))
    elif path.suffix == MANIFEST:
        found = [_beside(path.with_suffix(ENGINE), path)]
    else:
        return [_beside(path, _manifest_beside(path))]
    if not found:
        raise ValueError(f"{path}: no engine is in it")
    return found


def _in_folder(folder: Path) -> Iterator[EngineFile]:
    for engine in sorted(folder.rglob(f"*{ENGINE}")):
        yield _beside(engine, _manifest_beside(engine))


def _manifest_beside(engine: Path) -> Path:
    places = (engine.with_suffix(MANIFEST), engine.with_name(f"{engine.name}{MANIFEST}"))
    for place in places:
        if place.is_file():
            return place
    if not engine.exists():
        raise FileNotFoundError(f"{engine}: no such file")
    raise ValueError(f"{engine}: its manifest is missing; it should be {places[0].name} or {places[1].name} beside it")


def _beside(engine: Path, manifest_file: Path) -> EngineFile:
    with manifest_file.open("rb") as stream:
        manifest = _read_manifest(stream, str(manifest_file))
    intact = None
    if engine.is_file():
        with engine.open("rb") as stream:
            intact = digest_of(stream) == manifest.engine.digest
    return EngineFile(str(engine), manifest, intact)


def _in_bundle(path: Path) -> Iterator[EngineFile]:
    try:
        with zipfile.ZipFile(path) as bundle:
            names = set(bundle.namelist())
            for name in sorted(n for n in names if n.endswith(ENGINE)):
                place = f"{path}: {name}"
                manifest_name = f"{name.removesuffix(ENGINE)}{MANIFEST}"
                if manifest_name not in names:
                    raise ValueError(f"{place}: its manifest {manifest_name} is missing")
                with bundle.open(manifest_name) as stream:
                    manifest = _read_manifest(stream, f"{path}: {manifest_name}")
                with bundle.open(name) as stream:
                    yield EngineFile(place, manifest, digest_of(stream) == manifest.engine.digest)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: the bundle is damaged: {error}") from error


def _read_manifest(stream: IO[bytes], name: str) -> reports_pb2.EngineManifest:
    data = stream.read(_MAX_MANIFEST_BYTES + 1)
    if len(data) > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{name}: too large for a manifest")
    try:
        # Fields that a later version added do not make it unreadable.
        manifest = Parse(data, reports_pb2.EngineManifest(), ignore_unknown_fields=True)
    except (ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not a manifest: {error}") from error
    if not manifest.runtime or not manifest.engine.digest:
        raise ValueError(f"{name}: not a manifest: it names no runtime or no engine")
    return manifest
