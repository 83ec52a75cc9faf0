"""WebDataset shards: tar files of images with their class numbers, read in place."""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from services.common.datasets.base import Images, LabelledSet
from services.common.datasets.pictures import SUFFIXES, read_pictures
from services.common.datasets.preprocessing import Preprocessor
from services.common.errors import InvalidArgumentError

LABEL = "cls"
MAX_LABEL_BYTES = 32
MAX_IMAGE_BYTES = 64 << 20
FIELD = "dataset.path"


@dataclass(frozen=True)
class Sample:
    """Where the encoded image of a sample lies, and its class.

    Attributes:
        shard: The tar file.
        name: Of the member.
        offset: Of its first byte in the file.
        size: In bytes.
        label: The class.
    """

    shard: Path
    name: str
    offset: int
    size: int
    label: int


@dataclass
class _Open:
    """A sample whose members are being met."""

    key: str
    images: list[tarfile.TarInfo] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


class WebDataset(LabelledSet):
    """Samples of one tar file, or of all tar files of a folder in the order of their names.

    The headers are read once, when the set is opened, and keep the place of each image; images are then read from where
    they are. Nothing is unpacked. Members of other kinds are ignored.

    Args:
        root: The dataset root; links in the folder may lead anywhere below it, and nowhere else.
        target: The file or folder.
        limit: Images to use; 0 for all, and headers behind them are not read.
        preprocess: Steps from pixels to input.
        description: Name for reports.

    Raises:
        InvalidArgumentError: A shard is missing or damaged, has a link, a device or a name that leads out of it, or a
            sample lacks its image or class, or has two.
    """

    def __init__(self, root: Path, target: Path, limit: int, preprocess: Preprocessor, description: str) -> None:
        self._preprocess = preprocess
        self._samples: list[Sample] = []
        for shard in _shards(root.resolve(), target):
            for sample in read_index(shard):
                self._samples.append(sample)
                if len(self._samples) == limit:
                    break
            if len(self._samples) == limit:
                break
        super().__init__(description, np.array([sample.label for sample in self._samples], np.int64))

    def _read(self, batch: int) -> Iterator[Images]:
        return read_pictures(self._encoded(), self._preprocess, batch, FIELD)

    def _encoded(self) -> Iterator[tuple[str, io.BytesIO]]:
        shard, stream = None, None
        try:
            for sample in self._samples:
                if sample.shard != shard or stream is None:
                    if stream is not None:
                        stream.close()
                    shard, stream = sample.shard, sample.shard.open("rb")
                stream.seek(sample.offset)
                yield f"{sample.shard.name}:{sample.name}", io.BytesIO(stream.read(sample.size))
        except OSError as error:
            raise _error(f"{shard.name if shard else 'a shard'} cannot be read: {error.strerror}") from error
        finally:
            if stream is not None:
                stream.close()


def read_index(shard: Path) -> Iterator[Sample]:
    """Yield the samples of a tar file in stored order; only headers and class numbers are read.

    Raises:
        InvalidArgumentError: As :class:`WebDataset`.
    """
    try:
        # Uncompressed only: a place in a compressed file cannot be gone to.
        with tarfile.open(shard, "r:") as archive:
            current: _Open | None = None
            while (member := archive.next()) is not None:
                # They would pile up there otherwise, a kilobyte for each file of the shard.
                cast("Any", archive).members.clear()
                _check(shard, member)
                if not member.isfile():
                    continue
                key, suffix = split_name(member.name)
                if current is None or key != current.key:
                    if current is not None:
                        yield from _closed(shard, current)
                    current = _Open(key)
                if f".{suffix}" in SUFFIXES:
                    current.images.append(member)
                elif suffix == LABEL:
                    current.labels.append(_label(shard, archive, member))
            _check_end(shard, archive)
            if current is not None:
                yield from _closed(shard, current)
    # Besides its own error, the reader lets through what damaged header fields cause.
    except (tarfile.TarError, ValueError, OverflowError, EOFError, MemoryError, RecursionError) as error:
        raise _error(f"{shard.name} is not a readable, uncompressed tar file: {error}") from error
    except OSError as error:
        raise _error(f"{shard.name} cannot be read: {error.strerror}") from error


def split_name(name: str) -> tuple[str, str]:
    """Return key and suffix of a member: they part at the first dot of its last component, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _check(shard: Path, member: tarfile.TarInfo) -> None:
    """Refuse what has no place in a shard; nothing is written anywhere, so this is to notice hostile files early."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise _error(f"{shard.name} has a member whose name leads out of it: {member.name!r}")
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise _error(f"{shard.name} has a link, a device or a sparse file, {member.name!r}; only plain files are read")
    if member.isfile() and member.offset_data + member.size > shard.stat().st_size:
        raise _error(f"{shard.name} is truncated in {member.name!r}")


def _check_end(shard: Path, archive: tarfile.TarFile) -> None:
    """Refuse a shard that goes on: the reader takes a damaged header, unless it is the first, for the end."""
    place = archive.offset
    with shard.open("rb") as stream:
        stream.seek(place)
        block = stream.read(tarfile.BLOCKSIZE)
    if len(block) not in (0, tarfile.BLOCKSIZE) or any(block):
        raise _error(f"{shard.name} is damaged at byte {place}: there must be a header, or the end")


def _label(shard: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    content = b""
    if member.size <= MAX_LABEL_BYTES:
        stream = archive.extractfile(member)
        content = stream.read() if stream is not None else b""
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content):
        raise _error(f"{shard.name}:{member.name} must hold a class number in digits")
    return int(content)


def _closed(shard: Path, sample: _Open) -> Iterator[Sample]:
    """Yield the sample, once complete; members that are neither image nor class make none."""
    if not sample.images and not sample.labels:
        return
    if len(sample.images) != 1 or len(sample.labels) != 1:
        raise _error(
            f"{shard.name}: sample {sample.key!r} has {len(sample.images)} images and {len(sample.labels)} .cls files "
            "in a row; it must have one of each"
        )
    image = sample.images[0]
    if image.size > MAX_IMAGE_BYTES:
        raise _error(f"{shard.name}:{image.name} has {image.size} bytes; at most {MAX_IMAGE_BYTES} are read")
    yield Sample(shard, image.name, image.offset_data, image.size, sample.labels[0])


def _shards(root: Path, target: Path) -> list[Path]:
    if target.is_file():
        return [target]
    found = sorted(path for path in target.iterdir() if path.suffix == ".tar" and path.is_file())
    if not found:
        raise _error("the folder has no .tar file")
    for shard in found:
        if not shard.resolve().is_relative_to(root):
            raise _error(f"{shard.name} is a link out of the dataset root")
    return found


def _error(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field=FIELD)
