"""granq quantize: the whole way from a model file to an unpacked bundle."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from granq.cli.session import DEFAULT_ADDRESS, Address, AsJson, Detached, connect, console, to_dict, write_json
from granq.cli.targets import Engine, parse_engines

if TYPE_CHECKING:
    from granq.client import Client
    from granq.v1.artifacts_pb2 import Artifact
    from granq.v1.common_pb2 import Dataset
    from granq.v1.coordinator_pb2 import PipelineSpec

DIGEST_PREFIX = "sha256:"
NumberT = TypeVar("NumberT", int, float)


class Mode(StrEnum):
    """Training modes."""

    CO_TRAIN = "co-train"
    REPLAY = "replay"


class DatasetKind(StrEnum):
    """How a labelled set is stored."""

    IMAGE_FOLDER = "image-folder"
    IDX = "idx"
    NPZ = "npz"
    CIFAR = "cifar"
    WEBDATASET = "webdataset"


MODEL, TRAIN, DATA, RESULT = "Model and bits", "Training", "Labelled set for the report", "Result"


def quantize(
    model: Annotated[str, typer.Argument(help="A .pt2 program or weights (safetensors, state dict), or sha256:….")],
    arch: Annotated[str, typer.Option(help="Architecture of weights, such as resnet18.", rich_help_panel=MODEL)] = "",
    input_shape: Annotated[
        str, typer.Option(help="C,H,W of one image; needed with --arch.", rich_help_panel=MODEL)
    ] = "",
    num_classes: Annotated[
        int | None, typer.Option(help="Classes, if the weights do not say.", rich_help_panel=MODEL)
    ] = None,
    mean: Annotated[
        str, typer.Option(help="Subtracted from pixels/255; one value, or one per channel.", rich_help_panel=MODEL)
    ] = "",
    std: Annotated[str, typer.Option(help="Divided by; as --mean.", rich_help_panel=MODEL)] = "",
    recipe: Annotated[
        str, typer.Option(help="Shipped recipe or .yaml file, for what is not given here.", rich_help_panel=MODEL)
    ] = "",
    weight_bits: Annotated[
        int | None, typer.Option("--weight-bits", "-w", help="2 to 8. Default: 4.", rich_help_panel=MODEL)
    ] = None,
    activation_bits: Annotated[
        int | None, typer.Option("--activation-bits", "-a", help="2 to 8. Default: 4.", rich_help_panel=MODEL)
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="LAYER:W:A for one layer; either may be empty; repeatable.", rich_help_panel=MODEL),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Where training images come from. Default: replay; co-train for simulations.", rich_help_panel=TRAIN
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs, warm-up included.", rich_help_panel=TRAIN)] = None,
    warmup_epochs: Annotated[
        int | None, typer.Option(help="First epochs, for the generator alone.", rich_help_panel=TRAIN)
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations in an epoch.", rich_help_panel=TRAIN)] = None,
    batch: Annotated[int | None, typer.Option(help="Images in an iteration.", rich_help_panel=TRAIN)] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Initial learning rate: relative to a tensor's size, or SGD's.", rich_help_panel=TRAIN),
    ] = None,
    feature_weight: Annotated[
        float | None, typer.Option(help="Weight of feature distillation.", rich_help_panel=TRAIN)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", rich_help_panel=TRAIN)] = None,
    synthesis_iterations: Annotated[
        int | None, typer.Option(help="Generator steps before images are drawn.", rich_help_panel=TRAIN)
    ] = None,
    images: Annotated[int | None, typer.Option(help="Synthetic images to make.", rich_help_panel=TRAIN)] = None,
    refined_share: Annotated[
        float | None, typer.Option(help="Of the images, refined from scenes, 0 to 1.", rich_help_panel=TRAIN)
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Path below the server's dataset root, or a local .npz.", rich_help_panel=DATA)
    ] = "",
    dataset_format: Annotated[
        DatasetKind | None, typer.Option(help="Default: npz by its name.", rich_help_panel=DATA)
    ] = None,
    split: Annotated[str, typer.Option(help="Part of an IDX or CIFAR set, such as t10k.", rich_help_panel=DATA)] = "",
    resize: Annotated[int | None, typer.Option(help="Pixels of the shorter side.", rich_help_panel=DATA)] = None,
    center_crop: Annotated[int | None, typer.Option(help="Side kept, in pixels.", rich_help_panel=DATA)] = None,
    pad: Annotated[int, typer.Option(help="Black pixels added on each side.", rich_help_panel=DATA)] = 0,
    channels: Annotated[int | None, typer.Option(help="1, or 3.", rich_help_panel=DATA)] = None,
    limit: Annotated[int, typer.Option(help="Only the first so many images; 0: all.", rich_help_panel=DATA)] = 0,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Device to build for, by name or .yaml file; repeatable.", rich_help_panel=RESULT),
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="Engine to build, without --target. Default: auto.", rich_help_panel=RESULT)
    ] = None,
    sm: Annotated[
        list[str] | None, typer.Option(help="Compute capability such as 8.9; repeatable.", rich_help_panel=RESULT)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the bundle. Default: MODEL-wWaA.", rich_help_panel=RESULT)
    ] = None,
    name: Annotated[str, typer.Option(help="Name to show. Default: the file's.", rich_help_panel=RESULT)] = "",
    request_id: Annotated[
        str, typer.Option(help="Repeats with this id return the first pipeline.", rich_help_panel=RESULT)
    ] = "",
    priority: Annotated[
        int, typer.Option(help="-100 to 100; of those that wait, the higher goes first.", rich_help_panel=RESULT)
    ] = 0,
    max_hours: Annotated[
        float | None, typer.Option(help="Time after which the pipeline fails.", rich_help_panel=RESULT)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and return.", rich_help_panel=RESULT)] = False,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Quantize a model: upload, submit, watch, fetch the bundle.

    Values that are not given are the recipe's, or the server's defaults. Ctrl-C leaves the pipeline running.
    """
    from granq import recipes, specs
    from granq.cli.follow import finish, follow

    with connect(address) as client:
        base = _recipe(recipe)
        quantization = specs.quantization_config(
            weight_bits or 0, activation_bits or 0, overrides=parse_overrides(override or [])
        )
        training = specs.training_config(
            mode=mode or "unspecified",
            epochs=epochs,
            iterations_per_epoch=iterations,
            warmup_epochs=warmup_epochs,
            batch_size=batch,
            learning_rate=lr,
            feature_weight=feature_weight,
            seed=seed,
        )
        shape = parse_numbers(input_shape, int, "--input-shape")
        statistics = parse_numbers(mean, float, "--mean"), parse_numbers(std, float, "--std")
        asked = engine is not None or sm or target
        engines = parse_engines(engine, sm or [], target or []) if asked or not recipe else []
        if engine is Engine.NONE:
            base.ClearField("engines")
        labelled: Dataset | None = None
        if dataset or base.HasField("dataset"):
            labelled = specs.dataset(
                _dataset_source(client, dataset, as_json),
                (dataset_format or "unspecified") if base.dataset.format else dataset_kind(dataset, dataset_format),
                split=split,
                resize=resize,
                center_crop=center_crop,
                pad=pad,
                channels=channels,
                mean=statistics[0],
                std=statistics[1],
                limit=limit,
            )
            if not dataset:
                labelled.ClearField("path")  # the recipe's stays
        source = specs.model_source(
            _model_artifact(client, model, as_json),
            architecture=arch,
            input_shape=shape,
            num_classes=num_classes,
            mean=statistics[0],
            std=statistics[1],
        )
        given = specs.pipeline_spec(
            source,
            quantization=quantization,
            training=training,
            synthesis=specs.synthesis_config(
                num_images=images, iterations=synthesis_iterations, seed=seed, refined_share=refined_share
            ),
            engines=engines,
            dataset=labelled,
            display_name=name or (arch if model.startswith(DIGEST_PREFIX) else Path(model).name),
            priority=priority,
            max_seconds=None if max_hours is None else 3600 * max_hours,
        )
        spec = recipes.combine(base, given)
        pipeline = client.submit(spec, request_id=request_id)
        if detach:
            if as_json:
                write_json({"pipeline": to_dict(pipeline), "bundle_dir": None})
            else:
                typer.echo(pipeline.pipeline_id)
            return
        stem = "model" if model.startswith(DIGEST_PREFIX) else Path(model).stem
        folder = out or Path(f"{stem}-w{spec.quantization.weight_bits}a{spec.quantization.activation_bits}")
        if not as_json:
            console().print(f"pipeline {pipeline.pipeline_id}")
        try:
            pipeline = follow(client, pipeline.pipeline_id, as_json=as_json)
        except Detached as left:
            raise Detached(f"{left} --out {folder}") from None
        finish(client, pipeline, folder, as_json=as_json, document_line=False)


def _recipe(name: str) -> "PipelineSpec":
    """Return what holds where the command line says nothing: the recipe, or this command's own defaults."""
    from granq import recipes
    from granq.v1.coordinator_pb2 import PipelineSpec

    spec = recipes.load(name) if name else PipelineSpec()
    spec.quantization.weight_bits = spec.quantization.weight_bits or 4
    spec.quantization.activation_bits = spec.quantization.activation_bits or 4
    return spec


def parse_overrides(texts: list[str]) -> dict[str, tuple[int | None, int | None]]:
    """Read LAYER:W:A texts; "fc:8:" keeps the activation bits.

    Raises:
        ValueError: Not of that form, or a layer named twice.
    """
    overrides: dict[str, tuple[int | None, int | None]] = {}
    for text in texts:
        layer, *widths = text.rsplit(":", 2)
        if not layer or len(widths) != 2 or not any(widths) or not all(w == "" or w.isdecimal() for w in widths):
            raise ValueError(f"--override must be LAYER:W:A, such as conv1:8:8 or fc:8:, not {text!r}")
        if layer in overrides:
            raise ValueError(f"--override names {layer} twice")
        overrides[layer] = (int(widths[0]) if widths[0] else None, int(widths[1]) if widths[1] else None)
    return overrides


def parse_numbers(text: str, kind: type[NumberT], option: str) -> list[NumberT]:
    """Read numbers separated by commas; "" gives none.

    Raises:
        ValueError: Not numbers.
    """
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(f"{option} must be numbers separated by commas, not {text!r}") from error


def dataset_kind(source: str, kind: DatasetKind | None) -> str:
    """Return the format of a labelled set, by option or by its name.

    Raises:
        ValueError: Neither says it.
    """
    if kind is None and not source.endswith(".npz"):
        raise ValueError(f"--dataset-format must be given: {', '.join(DatasetKind)}")
    return kind or DatasetKind.NPZ


def _dataset_source(client: "Client", source: str, as_json: bool) -> "str | Artifact":
    """Upload a local .npz; everything else is a path on the server."""
    if source.endswith(".npz") and Path(source).is_file():
        return _upload(client, Path(source), as_json)
    return source


def _model_artifact(client: "Client", model: str, as_json: bool) -> "Artifact":
    if model.startswith(DIGEST_PREFIX):
        return client.stat(model)
    return _upload(client, Path(model), as_json)


def _upload(client: "Client", path: Path, as_json: bool) -> "Artifact":
    from granq.cli.view import transfer_bar

    with transfer_bar(console(as_json), f"upload {path.name}") as progress:
        return client.upload(path, progress=progress)
