"""Writes small files of the forms in which CIFAR is published."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def images_and_labels(count: int, classes: int, seed: int = 0) -> tuple[NDArray[np.uint8], list[int]]:
    """Return pixels N×3072, channel by channel as CIFAR stores them, and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, classes, count).tolist()


def binary(path: Path, pixels: NDArray[np.uint8], labels: list[int], coarse: bool) -> None:
    """Write the binary form; CIFAR-100 has a coarse label before the fine one."""
    before = [np.full(len(labels), 7, np.uint8)] if coarse else []
    columns = [*before, np.array(labels, np.uint8)]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate([np.stack(columns, axis=1), pixels], axis=1).tofile(path)


def python2(pixels: NDArray[np.uint8], labels: list[int], key: str) -> bytes:
    """Return the operations that Python 2's cPickle wrote for the published files, protocol 2."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04("
        b"K\x01" + b"M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes() + b"tb"
    )
    numbers = b"]q\x07(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"]q\x08(" + b"".join(b"U\x05a.png" for _ in labels) + b"e"
    return b"".join(
        [
            b"\x80\x02}q\x01(",
            b"U\x0bbatch_labelU\x0btest batch1",
            b"U\x09filenames" + names,
            b"U" + bytes([len(key)]) + key.encode() + numbers,
            b"U\x04data" + array,
            b"u.",
        ]
    )
