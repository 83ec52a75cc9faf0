"""Loads a user's model, of any accepted format, as one kind of graph."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import fx, nn

from granq.v1 import common_pb2, reports_pb2
from services.common.artifacts import ArtifactStore
from services.common.models import architectures
from services.common.models.archive import Pt2Archive, detect_format, refuse
from services.common.models.canonical import canonicalize
from services.common.models.capture import capture
from services.common.models.exported import read_program
from services.common.models.weights import check_numbers, read_state_dict

_NAMES: Final = {
    common_pb2.MODEL_FORMAT_TORCH_EXPORT: "a torch.export archive",
    common_pb2.MODEL_FORMAT_SAFETENSORS: "safetensors",
    common_pb2.MODEL_FORMAT_STATE_DICT: "a PyTorch state dict",
}


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained classifier, ready to be analysed.

    Attributes:
        module: Canonical graph in eval mode, float32, on the CPU (see services.common.models.canonical).
        input_shape: Channels, height and width of one image.
        num_classes: Number of logits.
        format: Format that it was read as.
        pixel_range: What black and white are in the model's input, float32 C each; None when the source does not say.
    """

    module: fx.GraphModule
    input_shape: tuple[int, int, int]
    num_classes: int
    format: "common_pb2.ModelFormat"
    pixel_range: tuple[torch.Tensor, torch.Tensor] | None = None


def load_model(source: common_pb2.ModelSource, store: ArtifactStore) -> LoadedModel:
    """Read, check and capture a model without running code that its file may hold.

    Args:
        source: What the user sent.
        store: Holds the artifact.

    Raises:
        NotFoundError: The store does not hold the artifact.
        InvalidArgumentError: With field and a stable reason, for every model that cannot be used: MODEL_UNSAFE_PICKLE,
            MODEL_TRUNCATED, MODEL_FORMAT_UNKNOWN, MODEL_FORMAT_MISMATCH, ARCHITECTURE_UNKNOWN, WEIGHTS_MISMATCH,
            INPUT_SHAPE_MISMATCH, BATCH_NORM_FOLDED, BATCH_NORM_MISSING, MODEL_NAN, MODEL_NOT_TRACEABLE and others.
    """
    path = store.local_path(source.artifact.digest)
    found = detect_format(path)
    if source.format not in (common_pb2.MODEL_FORMAT_UNSPECIFIED, found):
        raise refuse(
            "MODEL_FORMAT_MISMATCH",
            f"the file is {_NAMES[found]}, not {_NAMES[source.format]} as declared",
            "model.format",
        )
    if found == common_pb2.MODEL_FORMAT_TORCH_EXPORT:
        module, shape = _load_program(source, path)
    else:
        module, shape = _load_named(source, path, found)
    _check_batch_norm(module)
    logits = module.graph.output_node().args[0]
    result: tuple[int, ...] = tuple(logits.meta["tensor_meta"].shape) if isinstance(logits, fx.Node) else ()
    if len(result) != 2 or result[1] < 2:
        raise refuse("MODEL_NOT_CLASSIFIER", f"the model must return logits N×K with K ≥ 2; it returns {result}")
    if source.HasField("num_classes") and source.num_classes != result[1]:
        raise refuse(
            "WEIGHTS_MISMATCH", f"the model has {result[1]} classes, not {source.num_classes}", "model.num_classes"
        )
    channels, height, width = shape
    return LoadedModel(module, (channels, height, width), int(result[1]), found, _pixel_range(source, channels))


def _pixel_range(source: common_pb2.ModelSource, channels: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not source.HasField("normalization"):
        return None
    given = {"mean": list(source.normalization.mean) or [0.0], "std": list(source.normalization.std) or [1.0]}
    for name, values in given.items():
        if len(values) not in (1, channels):
            raise refuse(
                "NORMALIZATION_MISMATCH",
                f"{name} has {len(values)} values; the model takes {channels} channels",
                f"model.normalization.{name}",
            )
    mean, std = (torch.tensor(values, dtype=torch.float64).expand(channels) for values in given.values())
    return (-mean / std).float(), ((1 - mean) / std).float()


def _load_program(source: common_pb2.ModelSource, path: Path) -> tuple[fx.GraphModule, tuple[int, ...]]:
    if source.architecture:
        raise refuse(
            "ARCHITECTURE_NOT_ALLOWED",
            "a .pt2 brings its own architecture; leave model.architecture empty",
            "model.architecture",
        )
    archive = Pt2Archive(path)
    check_numbers(archive.tensors)
    raw, shape, batch = read_program(archive)
    if source.input_shape and tuple(source.input_shape) != shape:
        raise refuse(
            "INPUT_SHAPE_MISMATCH",
            f"the .pt2 takes images of shape {_by(shape)}, not {_by(source.input_shape)}",
            "model.input_shape",
        )
    return canonicalize(raw, shape, batch), shape


def _load_named(
    source: common_pb2.ModelSource, path: Path, found: "common_pb2.ModelFormat"
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    if not source.architecture:
        raise refuse(
            "ARCHITECTURE_REQUIRED",
            f'{_NAMES[found]} needs model.architecture, such as "resnet18"',
            "model.architecture",
        )
    if len(source.input_shape) != 3:
        raise refuse(
            "INPUT_SHAPE_REQUIRED", "a named architecture needs model.input_shape (C, H, W)", "model.input_shape"
        )
    architectures.check_name(source.architecture)
    state = read_state_dict(path, found)
    check_numbers(state)
    shape = tuple(source.input_shape)
    model = architectures.build(
        source.architecture, state, shape[0], source.num_classes if source.HasField("num_classes") else None
    )
    return capture(model, shape), shape


def _check_batch_norm(module: fx.GraphModule) -> None:
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None and float(layer.running_var.min()) < 0:
            raise refuse("BATCH_NORM_INVALID", f"BatchNorm {name!r} holds a negative variance")
    if layers:
        return
    missing = f"the model {architectures.no_batch_norm(module)}"
    other = any(isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for m in module.modules())
    if convolutions and all(m.bias is not None for m in convolutions) and not other:
        raise refuse(
            "BATCH_NORM_FOLDED",
            f"{missing}. As all its convolutions have biases, BatchNorm seems to be folded into them: send the model "
            "from before folding (fusing). A network that never had BatchNorm cannot be quantized without data here",
        )
    raise refuse("BATCH_NORM_MISSING", f"{missing}; without them a network cannot be quantized without data here")


def summarize(model: LoadedModel) -> reports_pb2.ModelSummary:
    """Return what was found in a model, with the multiply-adds of each layer for one image."""
    summary = reports_pb2.ModelSummary(
        format=model.format,
        input_shape=model.input_shape,
        num_classes=model.num_classes,
        parameters=sum(parameter.numel() for parameter in model.module.parameters()),
    )
    for node in model.module.graph.nodes:
        if node.op != "call_module":
            continue
        layer = model.module.get_submodule(str(node.target))
        if isinstance(layer, nn.BatchNorm2d):
            summary.batch_norm_layers += 1
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            result = node.meta["tensor_meta"].shape
            # A weight is used once for each position of the result: H×W of a convolution, leading axes of a Linear.
            positions = result[2:] if isinstance(layer, nn.Conv2d) else result[1:-1]
            summary.layers.add(
                name=str(node.target),
                kind="Conv2d" if isinstance(layer, nn.Conv2d) else "Linear",
                weight_shape=list(layer.weight.shape),
                multiply_adds=layer.weight.numel() * int(torch.Size(positions).numel()),
            )
    return summary


def _by(shape: object) -> str:
    return "×".join(str(size) for size in shape)  # type: ignore[attr-defined]
