"""Draws a synthetic set from a trained generator and writes it as one safetensors file, as a stream."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import torch

from granq.v1 import artifacts_pb2
from services.common.artifacts import ArtifactStore
from services.generator.synthesis import Batch, Synthesizer

# Batches drawn for each batch that is kept, at most.
_OVERDRAW: Final = 4


def drawn_set(synthesizer: Synthesizer, count: int) -> Iterator[Batch]:
    """Draw batches and yield of each what is kept, ``count`` images in all.

    The set gives activations their ranges and students their lessons, so images count that the teacher takes for what
    they were made for. Up to four times as many as needed are drawn, and those are kept; images of other kinds fill the
    set up only as far as the draws do not suffice. The choice looks at one batch at a time and never at the whole set,
    which may be larger than memory.
    """
    size = synthesizer.parameters.batch_size
    budget = _OVERDRAW * -(-count // size)
    while count:
        budget -= 1
        batch = synthesizer.draw(train=False)
        agrees = batch.logits.argmax(dim=1) == batch.labels
        order = torch.argsort(agrees.logical_not(), stable=True)
        must = count - max(budget, 0) * size
        chosen = order[: min(max(int(agrees.sum()), must), count)]
        count -= len(chosen)
        yield replace(batch, images=batch.images[chosen], labels=batch.labels[chosen], logits=batch.logits[chosen])


def write_set(
    store: ArtifactStore,
    synthesizer: Synthesizer,
    num_images: int,
    on_progress: Callable[[int], None],
) -> tuple[artifacts_pb2.Artifact, float]:
    """Write "images" N×C×H×W, "labels" N and "logits" N×K; return the file and the label agreement.

    Args:
        store: Where to.
        synthesizer: The trained generator.
        num_images: Images to write.
        on_progress: Called with the number of images written, for each batch; what it raises ends the writing.
    """
    labels: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    written = agreeing = 0
    with store.writer("synthetic-set.safetensors", "application/octet-stream") as writer:
        writer.write(_header(num_images, synthesizer.input_shape, synthesizer.num_classes))
        for batch in drawn_set(synthesizer, num_images):
            writer.write(_bytes(batch.images))
            labels.append(batch.labels.cpu())
            logits.append(batch.logits.cpu())
            written += len(batch.labels)
            agreeing += int((batch.logits.argmax(dim=1) == batch.labels).sum())
            on_progress(written)
        writer.write(_bytes(torch.cat(labels)))
        writer.write(_bytes(torch.cat(logits)))
        return writer.commit(), agreeing / num_images


def _header(num_images: int, input_shape: tuple[int, int, int], num_classes: int) -> bytes:
    """Return the head of a safetensors file: the length of a JSON text, and that text, padded to 8 bytes."""
    entries: dict[str, object] = {}
    offset = 0
    for name, dtype, shape, item in (
        ("images", "F32", [num_images, *input_shape], 4),
        ("labels", "I64", [num_images], 8),
        ("logits", "F32", [num_images, num_classes], 4),
    ):
        end = offset + item * int(torch.Size(shape).numel())
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
