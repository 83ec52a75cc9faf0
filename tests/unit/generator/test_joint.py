import pytest
import torch

from granq.v1 import artifacts_pb2, common_pb2, generator_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError, NotFoundError
from services.common.tensors import to_tensor
from services.generator.joint import JointTraining
from tests.support.teachers import teacher


def _zeros(*shape: int) -> common_pb2.Tensor:
    return to_tensor(torch.zeros(shape).numpy())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store").as_uri())


@pytest.fixture(scope="module")
def model(store: ArtifactStore, tmp_path_factory: pytest.TempPathFactory) -> common_pb2.ModelSource:
    return teacher(store, tmp_path_factory.mktemp("model"))


def test_what_the_student_sends_is_checked(store: ArtifactStore, model: common_pb2.ModelSource) -> None:
    training = JointTraining(generator_pb2.CoTrainOpen(model=model, batch_size=4), store, 1, 1 << 20)
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


def test_a_batch_must_fit_into_a_message(store: ArtifactStore, model: common_pb2.ModelSource) -> None:
    opening = generator_pb2.CoTrainOpen(model=model, batch_size=4096)
    with pytest.raises(InvalidArgumentError) as caught:
        JointTraining(opening, store, 1, 1 << 20)
    assert (caught.value.reason, caught.value.field) == ("BATCH_TOO_LARGE", "open.batch_size")
    assert str(((1 << 20) - 4096) // (4 * (192 + 5) + 8)) in caught.value.message


def test_what_the_store_does_not_hold_is_told_by_field(store: ArtifactStore, model: common_pb2.ModelSource) -> None:
    absent = artifacts_pb2.Artifact(digest=f"sha256:{'0' * 64}")
    openings = {
        "model.artifact": generator_pb2.CoTrainOpen(model=common_pb2.ModelSource(artifact=absent), batch_size=4),
        "resume_from": generator_pb2.CoTrainOpen(model=model, batch_size=4, resume_from=absent),
    }
    for field, opening in openings.items():
        with pytest.raises(NotFoundError) as caught:
            JointTraining(opening, store, 1, 1 << 20)
        assert caught.value.field == field
