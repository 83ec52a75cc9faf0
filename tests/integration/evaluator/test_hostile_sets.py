"""Labelled sets that were made to fill the memory or to stop the reader: each fails its job, and the server goes on."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest
from PIL import Image

from granq.v1 import common_pb2, evaluator_pb2, jobs_pb2
from services.common.settings import MIB
from tests.support.evaluator_server import Evaluator, key, running_evaluator
from tests.support.hostile_sets import FOLDER, declares_much, expands, many_large, one_large, picture

pytestmark = pytest.mark.timeout(60)

INVALID, EXHAUSTED = (code.value[0] for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED))


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


async def test_images_that_do_not_fit_into_memory_together(evaluator: Evaluator) -> None:
    dataset = many_large(evaluator.datasets)
    assert (evaluator.datasets / dataset.path).stat().st_size < 4 * MIB
    found = (await failure(evaluator, dataset, 8)).failure
    assert (found.code, found.reason, found.field) == (EXHAUSTED, "READ_MEMORY", "dataset")


async def test_an_image_that_never_comes(evaluator: Evaluator) -> None:
    folder = evaluator.datasets / "slow" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    os.mkfifo(folder / "b.png")  # Whoever opens it waits for a writer.
    found = (await failure(evaluator, common_pb2.Dataset(path="slow", format=FOLDER), 1)).failure
    assert (found.code, found.reason, found.field) == (EXHAUSTED, "READ_TIME", "dataset")


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
