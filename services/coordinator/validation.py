"""Refuses pipelines that could not end well, before anything starts.

Rules on single messages are in the contract and enforced before the call gets here. These rules join several messages,
or ask the artifact store. What only the model's content can tell is left to the VALIDATE stage.
"""

import itertools
from pathlib import PurePosixPath

from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2
from services.common import defaults
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError, NotFoundError
from services.coordinator.requests import simulation_only


def check_spec(spec: coordinator_pb2.PipelineSpec, store: ArtifactStore) -> None:
    """Check a spec; blocks on the store.

    Raises:
        InvalidArgumentError: Parts of the spec contradict each other.
        NotFoundError: The store does not hold an artifact that the spec names.
    """
    _check_model(spec.model)
    _check_training(spec.training, simulated=simulation_only(spec))
    _check_generator(spec.synthesis.generator)
    if spec.HasField("dataset"):
        _check_dataset(spec.dataset)
    if simulation_only(spec) and spec.engines:
        name = common_pb2.ActivationGranularity.Name(spec.quantization.activation_granularity)
        raise InvalidArgumentError(
            f"{name} is simulation only, so no engine can be built from it; leave engines out, or use "
            "ACTIVATION_GRANULARITY_PER_CHANNEL",
            field="spec.engines",
        )
    check_stored(spec, store)


def check_stored(spec: coordinator_pb2.PipelineSpec, store: ArtifactStore) -> None:
    """Check that the store holds what a spec names; blocks on the store.

    Raises:
        InvalidArgumentError: An artifact has another size than the spec says.
        NotFoundError: The store does not hold one.
    """
    _check_stored(spec.model.artifact, store, "spec.model.artifact")
    if spec.dataset.WhichOneof("source") == "artifact":
        _check_stored(spec.dataset.artifact, store, "spec.dataset.artifact")


def _check_model(model: common_pb2.ModelSource) -> None:
    named = (common_pb2.MODEL_FORMAT_SAFETENSORS, common_pb2.MODEL_FORMAT_STATE_DICT)
    if model.format in named and not model.architecture:
        raise InvalidArgumentError(
            "weights need the name of the architecture that they belong to, such as resnet18",
            field="spec.model.architecture",
        )
    if model.format == common_pb2.MODEL_FORMAT_TORCH_EXPORT and model.architecture:
        raise InvalidArgumentError(
            f"a .pt2 program carries its own architecture; leave out {model.architecture!r}",
            field="spec.model.architecture",
        )
    if model.architecture and not model.input_shape:
        raise InvalidArgumentError(
            f"{model.architecture} needs the shape of one image: channels, height, width",
            field="spec.model.input_shape",
        )


def _check_training(training: common_pb2.TrainingConfig, *, simulated: bool) -> None:
    epochs = training.epochs if training.HasField("epochs") else defaults.EPOCHS
    warmup = training.warmup_epochs if training.HasField("warmup_epochs") else defaults.warmup_epochs(epochs)
    unspecified = training.mode == common_pb2.TRAINING_MODE_UNSPECIFIED
    co_trains = simulated if unspecified else training.mode == common_pb2.TRAINING_MODE_CO_TRAIN
    if co_trains and 0 < epochs <= warmup:
        raise InvalidArgumentError(
            f"warmup_epochs {warmup} must be below epochs {epochs}: the student learns only after the warm-up",
            field="spec.training.warmup_epochs",
        )
    milestones = list(training.milestones)
    if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
        raise InvalidArgumentError(f"milestones must ascend, got {milestones}", field="spec.training.milestones")
    if training.schedule == common_pb2.LEARNING_RATE_SCHEDULE_STEP and not milestones:
        raise InvalidArgumentError("the STEP schedule needs milestones", field="spec.training.milestones")


def _check_generator(generator: common_pb2.GeneratorConfig) -> None:
    lower = generator.lambda_lower if generator.HasField("lambda_lower") else defaults.LAMBDA_LOWER
    upper = generator.lambda_upper if generator.HasField("lambda_upper") else defaults.LAMBDA_UPPER
    if lower > upper:
        raise InvalidArgumentError(
            f"lambda_lower {lower} is above lambda_upper {upper}", field="spec.synthesis.generator.lambda_lower"
        )


def _check_dataset(dataset: common_pb2.Dataset) -> None:
    if dataset.WhichOneof("source") == "artifact":
        if dataset.format != common_pb2.DATASET_FORMAT_NPZ:
            raise InvalidArgumentError("an uploaded dataset must be an NPZ file", field="spec.dataset.format")
        return
    path = PurePosixPath(dataset.path)
    if path.is_absolute() or ".." in path.parts:
        raise InvalidArgumentError(
            f"the path must be inside of the evaluator's dataset root, got {dataset.path!r}", field="spec.dataset.path"
        )


def _check_stored(artifact: artifacts_pb2.Artifact, store: ArtifactStore, field: str) -> None:
    try:
        found = store.stat(artifact.digest)
    except NotFoundError as error:
        raise NotFoundError(
            f"the store does not hold {artifact.digest}; upload it first", reason=error.reason, field=f"{field}.digest"
        ) from error
    if artifact.size_bytes and artifact.size_bytes != found.size_bytes:
        raise InvalidArgumentError(
            f"size_bytes says {artifact.size_bytes}, but {artifact.digest} has {found.size_bytes}",
            field=f"{field}.size_bytes",
        )
