"""Where training images come from: a set made once (replay), or a generator that learns along (co-training)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.common.errors import InvalidArgumentError
from services.common.synthetic import held_out


@dataclass(frozen=True)
class Batch:
    """Images N×C×H×W float32, the labels N int64 that they were made for, the teacher's logits N×K float32."""

    images: Tensor
    labels: Tensor
    logits: Tensor


class BatchSource(Protocol):
    """Gives one batch an iteration and may want the gradients of the generator's loss in return."""

    wants_gradients: bool

    def next(self, iteration: int) -> Batch:
        """Return the batch of ``iteration``; iterations are asked for in order."""

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        """Take ∂L/∂images (N×C×H×W) and ∂L/∂T (N×K) of the batch of ``iteration``."""

    def save(self) -> str:
        """Return the digest of the source's state after the last answer, "" when it needs none."""

    def close(self) -> None:
        """Release what the source holds."""


@dataclass(frozen=True)
class SyntheticSet:
    """A synthetic set, split: the held-out images serve measurement alone."""

    train: Batch
    held_out: Batch


def read_synthetic_set(path: Path, input_shape: tuple[int, int, int], num_classes: int) -> SyntheticSet:
    """Read a set that the generator's Synthesize wrote (safetensors).

    Raises:
        InvalidArgumentError: not such a file, or made for another model.
    """
    field = "synthetic_set"
    try:
        with safe_open(path, framework="pt") as file:
            images, labels, logits = (file.get_tensor(name) for name in ("images", "labels", "logits"))
    except SafetensorError as error:
        raise InvalidArgumentError(
            f"the synthetic set is not a safetensors file with images, labels and logits: {error}",
            reason="SYNTHETIC_SET_UNREADABLE",
            field=field,
        ) from error
    count = len(images)
    if images.shape[1:] != torch.Size(input_shape) or logits.shape != (count, num_classes) or labels.shape != (count,):
        raise InvalidArgumentError(
            f"the synthetic set holds images {tuple(images.shape)}, labels {tuple(labels.shape)} and logits "
            f"{tuple(logits.shape)}; the model takes {input_shape} and has {num_classes} classes",
            reason="SYNTHETIC_SET_MISMATCH",
            field=field,
        )
    if not (torch.isfinite(images).all() and torch.isfinite(logits).all()):
        raise InvalidArgumentError("the synthetic set holds NaN or infinity", reason="SYNTHETIC_SET_NAN", field=field)
    if count < 2:
        raise InvalidArgumentError(
            "the synthetic set has no image to hold out; make it with at least 2", reason="SET_SMALL", field=field
        )
    cut = count - held_out(count)
    return SyntheticSet(
        Batch(images[:cut].float(), labels[:cut].long(), logits[:cut].float()),
        Batch(images[cut:].float(), labels[cut:].long(), logits[cut:].float()),
    )


class ReplaySource:
    """Draws batches from a set, each image once a pass, in an order that depends on seed and iteration alone."""

    wants_gradients = False

    def __init__(self, batch: Batch, batch_size: int, seed: int, device: torch.device) -> None:
        self._data = Batch(batch.images.to(device), batch.labels.to(device), batch.logits.to(device))
        self._size = min(batch_size, len(batch.images))
        self._seed = seed
        self._pass = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def next(self, iteration: int) -> Batch:
        """Return the batch of ``iteration``."""
        per_pass = len(self._data.images) // self._size
        number, position = divmod(iteration, per_pass)
        if number != self._pass:
            rng = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % 2**63)
            self._order = torch.randperm(len(self._data.images), generator=rng)
            self._pass = number
        index = self._order[position * self._size : (position + 1) * self._size].to(self._data.images.device)
        return Batch(self._data.images[index], self._data.labels[index], self._data.logits[index])

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        """Take nothing: the set does not learn."""

    def save(self) -> str:
        """Return "": the order follows from the iteration."""
        return ""

    def close(self) -> None:
        """Hold nothing."""
