from pathlib import Path

import pytest
import torch

from granq.v1 import common_pb2, generator_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError
from services.common.tensors import to_tensor
from services.generator.joint import JointTraining
from tests.support.teachers import teacher


def _zeros(*shape: int) -> common_pb2.Tensor:
    return to_tensor(torch.zeros(shape).numpy())


def test_what_the_student_sends_is_checked(tmp_path: Path) -> None:
    store = ArtifactStore((tmp_path / "store").as_uri())
    training = JointTraining(generator_pb2.CoTrainOpen(model=teacher(store, tmp_path), batch_size=4), store, 1, 1 << 20)
    response = training.draw()
    assert response.batch.iteration == 0
    assert list(response.batch.images.shape) == [4, 3, 8, 8]
    assert list(response.batch.logits.shape) == [4, 5]
    images, logits = _zeros(4, 3, 8, 8), _zeros(4, 5)
    nan = to_tensor(torch.full((4, 5), torch.nan).numpy())
    for gradients, reason, field in (
        ({"iteration": 7, "images": images, "logits": logits}, "ITERATION_MISMATCH", "gradients.iteration"),
        ({"images": _zeros(1, 3, 8, 8), "logits": logits}, "GRADIENT_SHAPE_MISMATCH", "gradients.images"),
        ({"images": images, "logits": nan}, "GRADIENT_NOT_FINITE", "gradients.logits"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            training.step(generator_pb2.CoTrainGradients(**gradients))
        assert (caught.value.reason, caught.value.field) == (reason, field)
    # What was refused changed nothing.
    before = training.save().saved
    assert before.iteration == 0
    training.step(generator_pb2.CoTrainGradients(images=images, logits=logits))
    after = training.save().saved
    assert after.iteration == 1
    assert after.state.digest != before.state.digest


def test_a_batch_must_fit_into_a_message(tmp_path: Path) -> None:
    store = ArtifactStore((tmp_path / "store").as_uri())
    opening = generator_pb2.CoTrainOpen(model=teacher(store, tmp_path), batch_size=4096)
    with pytest.raises(InvalidArgumentError) as caught:
        JointTraining(opening, store, 1, 1 << 20)
    assert (caught.value.reason, caught.value.field) == ("BATCH_TOO_LARGE", "open.batch_size")
    assert str(((1 << 20) - 4096) // (4 * (192 + 5) + 8)) in caught.value.message
