"""Labelled sets whose sizes are lies, or true and absurd; each is written below a dataset root."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from granq.v1 import common_pb2
from services.common.settings import MIB

NPZ, IDX, FOLDER = (
    common_pb2.DATASET_FORMAT_NPZ,
    common_pb2.DATASET_FORMAT_IDX,
    common_pb2.DATASET_FORMAT_IMAGE_FOLDER,
)


def _grey_npz(path: Path, count: int, side: int) -> None:
    """Write images that take count·side² bytes once read, and next to nothing before."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as stream:
            npy.write_array_header_1_0(stream, header)
            for _ in range(count):
                stream.write(bytes(side * side))
        with archive.open("labels.npy", "w") as stream:
            npy.write_array(stream, np.zeros(count, np.int64))


def declares_much(root: Path) -> common_pb2.Dataset:
    """Return an archive whose header speaks of terabytes."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (50_000_000, 256, 256)}
    with zipfile.ZipFile(root / "declares.npz", "w") as archive, archive.open("images.npy", "w") as stream:
        npy.write_array_header_1_0(stream, header)
    return common_pb2.Dataset(path="declares.npz", format=NPZ)


def expands(root: Path) -> common_pb2.Dataset:
    """Return IDX files of three images, behind which 64 MiB of nothing are compressed."""
    folder = root / "expands"
    folder.mkdir()
    head = struct.pack(">BBBB3I", 0, 0, 8, 3, 3, 8, 8) + bytes(3 * 64)
    with gzip.open(folder / "x-images-idx3-ubyte.gz", "wb", compresslevel=1) as stream:
        stream.write(head)
        for _ in range(64):
            stream.write(bytes(MIB))
    (folder / "x-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes(3))
    return common_pb2.Dataset(path="expands", format=IDX)


def one_large(root: Path) -> common_pb2.Dataset:
    """Return an archive with one image of 40 MB, whose floats would be four times that."""
    _grey_npz(root / "large.npz", 1, 6500)
    return common_pb2.Dataset(path="large.npz", format=NPZ)


def picture(root: Path) -> common_pb2.Dataset:
    """Return a folder with a PNG of a few bytes that declares ten gigapixels."""
    folder = root / "picture" / "cat"
    folder.mkdir(parents=True)
    parts = (b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return common_pb2.Dataset(path="picture", format=FOLDER)


def many_large(root: Path) -> common_pb2.Dataset:
    """Return an archive of eight such images in a few kilobytes, which preprocessing makes small."""
    _grey_npz(root / "many.npz", 8, 6500)
    small = common_pb2.Preprocessing(resize=8, channels=3)
    return common_pb2.Dataset(path="many.npz", format=NPZ, preprocessing=small)
