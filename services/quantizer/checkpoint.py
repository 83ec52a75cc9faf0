"""Files of the quantizer in the artifact store: training checkpoints and quantized models, both safetensors.

safetensors holds tensors and text only, so reading one can run no code.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, fx

from granq.v1 import artifacts_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError
from services.quantizer.config import Quantization
from services.quantizer.diagnostics import Layers
from services.quantizer.graph import channels_of
from services.quantizer.grids import ODD_UP_TO
from services.quantizer.learned import ActivationQuantizer, QuantizedLayer
from services.quantizer.student import build_student
from services.quantizer.training import Trainer

FORM = "quantizer/5"
"""Names what a checkpoint holds. Change it with that: a training whose checkpoint has another form begins anew."""
# Up to how many bits weights have odd codes: the weights alone do not tell. Before, a file said it of two bits only.
_ODD_UP_TO = "odd_codes_up_to"
# What black and white are in the model's input, and which codes activations have: neither is among the tensors, and
# another range of codes is another model.
_PIXELS, _CODES = "pixels", "codes"
_MEDIA_TYPE = "application/vnd.safetensors"


def _put(
    store: ArtifactStore, tensors: dict[str, Tensor], metadata: dict[str, str], name: str
) -> artifacts_pb2.Artifact:
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    return store.put_bytes(_canonical(save(contiguous, metadata)), name=name, media_type=_MEDIA_TYPE)


def _canonical(file: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted by key.

    The library writes metadata in an order that differs from call to call. Artifacts are named by their content, so the
    same model would get another name each time.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return len(text).to_bytes(8, "little") + text + file[end:]


@dataclass(frozen=True)
class Checkpoint:
    """Where a training was, beside the tensors of its trainer.

    Attributes:
        tensors: What ``Trainer.load_state`` takes.
        iteration: Finished iterations.
        generator: Digest of the generator's state, or "".
        seconds: Time spent.
        before: What ``diagnostics.measure`` found before the training.
    """

    tensors: dict[str, Tensor]
    iteration: int
    generator: str
    seconds: float
    before: Layers


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint's file, and the digest of the generator's state that it refers to, or ""."""

    artifact: artifacts_pb2.Artifact
    generator: str


def save_checkpoint(store: ArtifactStore, trainer: Trainer, seconds: float, before: Layers) -> StoredCheckpoint:
    """Store all that training goes on from, the generator's state included by its digest."""
    generator = trainer.source.save()
    metadata = {
        "iteration": str(trainer.iteration),
        "generator": generator,
        "seconds": repr(seconds),
        "before": json.dumps(before),
    }
    return StoredCheckpoint(_put(store, trainer.state(), metadata, "training.safetensors"), generator)


def load_checkpoint(path: Path) -> Checkpoint:
    """Return what ``save_checkpoint`` stored."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return Checkpoint(
        load_file(path),
        int(metadata["iteration"]),
        metadata["generator"],
        float(metadata["seconds"]),
        json.loads(metadata["before"]),
    )


def save_student(
    store: ArtifactStore,
    student: fx.GraphModule,
    quantization: Quantization,
    model_digest: str,
    pixel_range: tuple[Tensor, Tensor] | None = None,
) -> artifacts_pb2.Artifact:
    """Store a student with its number formats, and what else it was made from.

    Args:
        store: Where to.
        student: As ``build_student`` made it.
        quantization: What it was made by.
        model_digest: Of the model that it was made from.
        pixel_range: What it was made by.
    """
    pixels = None if pixel_range is None else [ends.tolist() for ends in pixel_range]
    metadata = {
        "quantization": quantization.to_json(),
        "model": model_digest,
        _ODD_UP_TO: str(ODD_UP_TO),
        _PIXELS: json.dumps(pixels),
        _CODES: json.dumps(_code_ranges(student)),
    }
    return _put(store, student.state_dict(), metadata, "quantized.safetensors")


def _code_ranges(student: fx.GraphModule) -> dict[str, list[int]]:
    """Return the least and the largest code of each activation that has codes."""
    return {
        name: [module.code_range.lo, module.code_range.hi]
        for name, module in student.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def _ends(pixels: list[list[float]], model: fx.GraphModule) -> tuple[Tensor, Tensor]:
    """Return black and white, C each; raises ValueError where there are not as many as the image has channels."""
    image = next(node for node in model.graph.nodes if node.op == "placeholder")
    black, white = (torch.tensor(ends) for ends in pixels)
    if not black.shape == white.shape == (channels_of(image),):
        raise ValueError(f"{_PIXELS} are not of {channels_of(image)} channels")
    return black, white


def load_student(path: Path, model: fx.GraphModule, model_digest: str) -> tuple[fx.GraphModule, Quantization]:
    """Rebuild the student that ``save_student`` stored, on the graph of the same model.

    Raises:
        InvalidArgumentError: not a quantized model, made from another model, or by a version whose weights or
            activations had other codes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        quantization = Quantization.from_json(metadata["quantization"])
        odd_up_to = int(metadata.get(_ODD_UP_TO, 2 if "two_bits" in metadata else 1))
        pixels, codes = json.loads(metadata.get(_PIXELS, "null")), json.loads(metadata.get(_CODES, "null"))
        pixel_range = None if pixels is None else _ends(pixels, model)
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:  # JSON's errors are ValueErrors
        raise InvalidArgumentError(
            f"the file is not a quantized model of this service: {error}",
            reason="QUANTIZED_MODEL_UNREADABLE",
            field="quantized_model",
        ) from error
    if metadata.get("model") != model_digest:
        raise InvalidArgumentError(
            f"the quantized model was made from {metadata.get('model')}, not from {model_digest}",
            reason="QUANTIZED_MODEL_MISMATCH",
            field="quantized_model",
        )
    student = build_student(model, quantization, pixel_range)
    widths = {module.bits.weight for module in student.modules() if isinstance(module, QuantizedLayer)}
    changed = [f"{bits}-bit weights" for bits in widths if (bits <= odd_up_to) != (bits <= ODD_UP_TO)]
    if codes != _code_ranges(student):
        changed.append("activations")
    if changed:
        raise InvalidArgumentError(
            f"the quantized model has {changed[0]} of an earlier version, whose codes were others; quantize it again",
            reason="QUANTIZED_MODEL_UNREADABLE",
            field="quantized_model",
        )
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"the quantized model does not fit the model's graph: {str(error).splitlines()[-1].strip()}",
            reason="QUANTIZED_MODEL_MISMATCH",
            field="quantized_model",
        ) from error
    return student, quantization
