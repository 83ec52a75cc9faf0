"""Builders that make the contract's messages from plain Python values.

What each value means, its range and its default stand in protos/granq/v1; a value left at None is not sent, so that the
server's default holds. The builders check names only; ranges are the server's to check.
"""

import datetime
from collections.abc import Mapping, Sequence

from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2

RUNTIME_NAMES = {"auto": "unspecified", "rtx": "tensorrt_rtx"}
GRANULARITY_DEFAULT = "unspecified"


def choice(names: Sequence[str], prefix: str, name: str, argument: str) -> str:
    """Return the one of an enum's ``names`` that is meant by a name such as "co-train"; "-" and letter case are free.

    Raises:
        ValueError: No such name; the message lists the names.
    """
    key = f"{prefix}_{name.upper().replace('-', '_')}"
    if key not in names:
        known = ", ".join(n.removeprefix(f"{prefix}_").lower().replace("_", "-") for n in names[1:])
        raise ValueError(f"{argument} must be one of {known}, not {name!r}")
    return key


def model_source(
    artifact: artifacts_pb2.Artifact,
    *,
    architecture: str = "",
    input_shape: Sequence[int] = (),
    num_classes: int | None = None,
    format: str = "unspecified",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> common_pb2.ModelSource:
    """Name a pretrained model: an uploaded .pt2, or weights and the architecture that they are for.

    Args:
        artifact: What :meth:`granq.Client.upload` returned.
        architecture: "resnet20", "resnet18" and so on; empty for .pt2.
        input_shape: (channels, height, width) of one image; may be empty for .pt2.
        num_classes: Number of logits, where the weights do not say.
        format: "torch-export", "safetensors" or "state-dict". Default: detected.
        mean: Mean that the model's input subtracts from pixels divided by 255; one value, or one per channel.
        std: Standard deviation that it divides by.

    Raises:
        ValueError: Unknown format.
    """
    value = choice(common_pb2.ModelFormat.keys(), "MODEL_FORMAT", format, "format")
    return common_pb2.ModelSource(
        artifact=artifact,
        format=value,
        architecture=architecture,
        num_classes=num_classes,
        input_shape=input_shape,
        normalization=common_pb2.Normalization(mean=mean, std=std) if mean or std else None,
    )


def quantization_config(
    weight_bits: int,
    activation_bits: int,
    *,
    input_bits: int | None = None,
    overrides: Mapping[str, tuple[int | None, int | None]] | None = None,
    activation_granularity: str = GRANULARITY_DEFAULT,
    weight_granularity: str = GRANULARITY_DEFAULT,
) -> common_pb2.QuantizationConfig:
    """Choose number formats; ``overrides`` maps a layer to (weight bits, activation bits), None keeps the common value.

    Raises:
        ValueError: Unknown granularity.
    """
    activation = choice(
        common_pb2.ActivationGranularity.keys(),
        "ACTIVATION_GRANULARITY",
        activation_granularity,
        "activation_granularity",
    )
    weight = choice(common_pb2.WeightGranularity.keys(), "WEIGHT_GRANULARITY", weight_granularity, "weight_granularity")
    return common_pb2.QuantizationConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        input_bits=input_bits,
        overrides=[
            common_pb2.LayerOverride(layer=layer, weight_bits=w, activation_bits=a)
            for layer, (w, a) in (overrides or {}).items()
        ],
        activation_granularity=activation,
        weight_granularity=weight,
    )


def training_config(
    *,
    mode: str = "unspecified",
    epochs: int | None = None,
    iterations_per_epoch: int | None = None,
    warmup_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    feature_weight: float | None = None,
    schedule: str = "unspecified",
    milestones: Sequence[int] = (),
    seed: int | None = None,
    checkpoint_interval: int | None = None,
) -> common_pb2.TrainingConfig:
    """Choose how the quantized model is trained: ``mode`` "co-train" or "replay", ``schedule`` "cosine" or "step".

    Raises:
        ValueError: Unknown mode or schedule.
    """
    mode_value = choice(common_pb2.TrainingMode.keys(), "TRAINING_MODE", mode, "mode")
    fall = choice(common_pb2.LearningRateSchedule.keys(), "LEARNING_RATE_SCHEDULE", schedule, "schedule")
    return common_pb2.TrainingConfig(
        mode=mode_value,
        epochs=epochs,
        iterations_per_epoch=iterations_per_epoch,
        warmup_epochs=warmup_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        feature_weight=feature_weight,
        schedule=fall,
        milestones=milestones,
        seed=seed,
        checkpoint_interval=checkpoint_interval,
    )


def synthesis_config(
    *,
    num_images: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    checkpoint_interval: int | None = None,
    generator: common_pb2.GeneratorConfig | None = None,
    refined_share: float | None = None,
    refinement_steps: int | None = None,
) -> common_pb2.SynthesisConfig:
    """Choose how the synthetic images are made."""
    return common_pb2.SynthesisConfig(
        num_images=num_images,
        iterations=iterations,
        batch_size=batch_size,
        seed=seed,
        checkpoint_interval=checkpoint_interval,
        generator=generator,
        refined_share=refined_share,
        refinement_steps=refinement_steps,
    )


def dataset(
    source: str | artifacts_pb2.Artifact,
    format: str,
    *,
    split: str = "",
    resize: int | None = None,
    center_crop: int | None = None,
    pad: int = 0,
    channels: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    limit: int = 0,
) -> common_pb2.Dataset:
    """Name a labelled set and the way from its pixels to the model's input.

    Args:
        source: Path below the evaluator's dataset root, or an uploaded .npz.
        format: "image-folder", "idx", "npz", "cifar" or "webdataset".
        split: Prefix of the files of an IDX folder, such as "t10k"; "train" or "test" of CIFAR.
        resize: Length in pixels of the shorter side.
        center_crop: Side in pixels of the centred square that is kept.
        pad: Black pixels added on each side.
        channels: 1, or 3.
        mean: Mean of each channel of the pixels divided by 255.
        std: Standard deviation of each channel.
        limit: Use the first so many images only; 0 for all.

    Raises:
        ValueError: Unknown format.
    """
    value = choice(common_pb2.DatasetFormat.keys(), "DATASET_FORMAT", format, "format")
    preprocessing = common_pb2.Preprocessing(
        resize=resize, center_crop=center_crop, pad=pad, channels=channels, mean=mean, std=std
    )
    result = common_pb2.Dataset(format=value, split=split, preprocessing=preprocessing, limit=limit)
    if isinstance(source, str):
        result.path = source
    else:
        result.artifact.CopyFrom(source)
    return result


def batch_profile(smallest: int = 1, typical: int = 8, largest: int = 64) -> common_pb2.BatchProfile:
    """Choose the batch sizes that an engine accepts and the one that it is tuned for."""
    return common_pb2.BatchProfile(min=smallest, opt=typical, max=largest)


def engine_target(
    runtime: str = "auto",
    *,
    compute_capabilities: Sequence[str] = (),
    batch: common_pb2.BatchProfile | None = None,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    name: str = "",
) -> common_pb2.EngineTarget:
    """Choose what an engine is built for: ``runtime`` "auto", "tensorrt" or "rtx"; capabilities such as "8.9".

    :mod:`granq.targets` has ready ones for common devices.

    Raises:
        ValueError: Unknown runtime.
    """
    value = choice(common_pb2.Runtime.keys(), "RUNTIME", RUNTIME_NAMES.get(runtime.lower(), runtime), "runtime")
    return common_pb2.EngineTarget(
        runtime=value,
        compute_capabilities=compute_capabilities,
        batch=batch,
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        name=name,
    )


def pipeline_spec(
    model: common_pb2.ModelSource,
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    quantization: common_pb2.QuantizationConfig | None = None,
    training: common_pb2.TrainingConfig | None = None,
    synthesis: common_pb2.SynthesisConfig | None = None,
    engines: Sequence[common_pb2.EngineTarget] = (),
    dataset: common_pb2.Dataset | None = None,
    display_name: str = "",
    priority: int = 0,
    max_seconds: float | None = None,
) -> coordinator_pb2.PipelineSpec:
    """Put a pipeline together; ``quantization`` replaces the two bit widths when it is given.

    Of the pipelines that wait, those with a higher ``priority`` go first. One that has not ended ``max_seconds`` after
    its submission fails.
    """
    return coordinator_pb2.PipelineSpec(
        model=model,
        quantization=quantization or quantization_config(weight_bits, activation_bits),
        training=training,
        synthesis=synthesis,
        engines=engines,
        dataset=dataset,
        display_name=display_name,
        priority=priority,
        max_duration=None if max_seconds is None else datetime.timedelta(seconds=max_seconds),
    )
