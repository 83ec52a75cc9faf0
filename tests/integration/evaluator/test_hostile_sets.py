"""Labelled sets that were made to fill the memory or to stop the reader: each fails its job, and the server goes on."""

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from numpy.lib import format as npy
from PIL import Image

from granq.v1 import common_pb2, evaluator_pb2, jobs_pb2
from services.common.settings import MIB
from tests.support.evaluator_server import Evaluator, key, running_evaluator

pytestmark = pytest.mark.timeout(60)

INVALID, EXHAUSTED = (code.value[0] for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED))
NPZ, IDX, FOLDER = (
    common_pb2.DATASET_FORMAT_NPZ,
    common_pb2.DATASET_FORMAT_IDX,
    common_pb2.DATASET_FORMAT_IMAGE_FOLDER,
)


@pytest.fixture
async def evaluator(tmp_path: Path) -> AsyncIterator[Evaluator]:
    async with running_evaluator(tmp_path, read_memory_bytes=256 * MIB, read_seconds=3) as running:
        yield running


async def failure(evaluator: Evaluator, dataset: common_pb2.Dataset, batch: int) -> jobs_pb2.Job:
    """Evaluate a graph on a set, which must fail, and return the job."""
    name = dataset.path.replace("/", "-")
    request = evaluator_pb2.StartEvaluateRequest(
        key=key(name), onnx_float=evaluator.put(), dataset=dataset, batch_size=batch
    )
    await evaluator.calls.StartEvaluate(request)
    job, _ = await evaluator.ended(name)
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    return job


def grey_npz(path: Path, count: int, side: int) -> None:
    """Write images that take count·side² bytes once read, and next to nothing before."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as stream:
            npy.write_array_header_1_0(stream, header)
            for _ in range(count):
                stream.write(bytes(side * side))
        with archive.open("labels.npy", "w") as stream:
            npy.write_array(stream, np.zeros(count, np.int64))


async def test_images_that_do_not_fit_into_memory_together(evaluator: Evaluator) -> None:
    grey_npz(evaluator.datasets / "many.npz", 8, 6500)
    assert (evaluator.datasets / "many.npz").stat().st_size < 4 * MIB
    small = common_pb2.Preprocessing(resize=8, channels=3)
    dataset = common_pb2.Dataset(path="many.npz", format=NPZ, preprocessing=small)
    found = (await failure(evaluator, dataset, 8)).failure
    assert (found.code, found.reason, found.field) == (EXHAUSTED, "READ_MEMORY", "dataset")


async def test_an_image_that_never_comes(evaluator: Evaluator) -> None:
    folder = evaluator.datasets / "slow" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    os.mkfifo(folder / "b.png")  # Whoever opens it waits for a writer.
    found = (await failure(evaluator, common_pb2.Dataset(path="slow", format=FOLDER), 1)).failure
    assert (found.code, found.reason, found.field) == (EXHAUSTED, "READ_TIME", "dataset")


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
    grey_npz(root / "large.npz", 1, 6500)
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


async def test_false_and_absurd_sizes_are_refused_by_field(evaluator: Evaluator) -> None:
    own = psutil.Process().memory_info().rss
    for make, field, words in (
        (declares_much, "dataset.path", "declares 3276800000000 bytes"),
        (expands, "dataset.path", "longer than it says"),
        (one_large, "dataset.preprocessing", "set resize and center_crop"),
        (picture, "dataset.path", "not a readable image"),
    ):
        found = (await failure(evaluator, make(evaluator.datasets), 8)).failure
        assert (found.code, found.field) == (INVALID, field), found
        assert words in found.message
    assert psutil.Process().memory_info().rss - own < 256 * MIB
    await evaluator.calls.GetCapabilities(evaluator_pb2.GetCapabilitiesRequest())
