"""Specs that could not end well are refused with the field at fault."""

from collections.abc import Callable

import pytest

from granq.v1 import common_pb2, coordinator_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import GranqError, InvalidArgumentError, NotFoundError
from services.coordinator.validation import check_spec
from tests.support.pipelines import artifact, spec

Spec = coordinator_pb2.PipelineSpec


def _training(**fields: object) -> Callable[[Spec], None]:
    return lambda made: made.training.MergeFrom(common_pb2.TrainingConfig(**fields))  # type: ignore[arg-type]


def _model(**fields: object) -> Callable[[Spec], None]:
    def change(made: Spec) -> None:
        for name, value in fields.items():
            made.model.ClearField(name)
            if value:
                setattr(made.model, name, value)

    return change


def _dataset(**fields: object) -> Callable[[Spec], None]:
    return lambda made: made.dataset.MergeFrom(common_pb2.Dataset(**fields))  # type: ignore[arg-type]


def _simulated_with_engine(made: Spec) -> None:
    made.quantization.activation_granularity = common_pb2.ACTIVATION_GRANULARITY_PER_TENSOR
    made.engines.add()


def _margins(made: Spec) -> None:
    made.synthesis.generator.lambda_lower = 0.9


def _simulated_without_a_learning_epoch(made: Spec) -> None:
    made.quantization.activation_granularity = common_pb2.ACTIVATION_GRANULARITY_PER_SAMPLE_CHANNEL
    made.training.warmup_epochs = 6


CO_TRAIN = common_pb2.TRAINING_MODE_CO_TRAIN
NPZ, IDX = common_pb2.DATASET_FORMAT_NPZ, common_pb2.DATASET_FORMAT_IDX


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_training(mode=CO_TRAIN, epochs=2, warmup_epochs=2), "spec.training.warmup_epochs"),
        (_training(mode=CO_TRAIN, epochs=3, warmup_epochs=3), "spec.training.warmup_epochs"),
        (_simulated_without_a_learning_epoch, "spec.training.warmup_epochs"),
        (_training(milestones=[5, 5]), "spec.training.milestones"),
        (_training(schedule=common_pb2.LEARNING_RATE_SCHEDULE_STEP), "spec.training.milestones"),
        (_margins, "spec.synthesis.generator.lambda_lower"),
        (_simulated_with_engine, "spec.engines"),
        (_model(architecture="", format=common_pb2.MODEL_FORMAT_SAFETENSORS), "spec.model.architecture"),
        (_model(format=common_pb2.MODEL_FORMAT_TORCH_EXPORT), "spec.model.architecture"),
        (_model(input_shape=None), "spec.model.input_shape"),
        (_dataset(artifact=artifact("b"), format=IDX), "spec.dataset.format"),
        (_dataset(path="/etc", format=IDX), "spec.dataset.path"),
        (_dataset(path="a/../../b", format=IDX), "spec.dataset.path"),
    ],
)
def test_contradictions_are_refused(store: ArtifactStore, change: Callable[[Spec], None], field: str) -> None:
    made = spec(store.put_bytes(b"model"))
    change(made)
    with pytest.raises(InvalidArgumentError) as caught:
        check_spec(made, store)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "change",
    [
        _training(),
        _training(epochs=0),
        _training(epochs=1, mode=common_pb2.TRAINING_MODE_REPLAY),
        _training(epochs=1),
        _training(mode=CO_TRAIN, epochs=3, warmup_epochs=0),
        _training(mode=CO_TRAIN, epochs=2),
        _dataset(path="fashion/test", format=IDX),
        _model(format=common_pb2.MODEL_FORMAT_SAFETENSORS),
    ],
)
def test_sound_specs_pass(store: ArtifactStore, change: Callable[[Spec], None]) -> None:
    made = spec(store.put_bytes(b"model"))
    change(made)
    check_spec(made, store)


def test_artifacts_must_be_stored(store: ArtifactStore) -> None:
    stored = store.put_bytes(b"model")
    cases: list[tuple[Spec, type[GranqError], str]] = [(spec(artifact()), NotFoundError, "spec.model.artifact.digest")]
    missing = spec(stored)
    missing.dataset.MergeFrom(common_pb2.Dataset(artifact=artifact("b"), format=NPZ))
    cases.append((missing, NotFoundError, "spec.dataset.artifact.digest"))
    wrong = spec(stored)
    wrong.model.artifact.size_bytes = 1
    cases.append((wrong, InvalidArgumentError, "spec.model.artifact.size_bytes"))
    for made, error, field in cases:
        with pytest.raises(error) as caught:
            check_spec(made, store)
        assert caught.value.field == field
