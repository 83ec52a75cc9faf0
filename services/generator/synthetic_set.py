"""Makes a synthetic set, drawn by a generator and refined from scenes, and writes it as one file, as a stream."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Self

import torch

from granq.v1 import artifacts_pb2
from services.common.artifacts import ArtifactStore
from services.common.synthetic import held_out
from services.generator.synthesis import Batch, Synthesizer

REFINED_SHARE: Final = 0.5
"""Of a set, where the request names none."""

REFINEMENT_STEPS: Final = 60
"""Where the request names none."""

# Batches drawn for each batch that is kept, at most.
_OVERDRAW: Final = 4
# Images that are refined together where they are small: the more, the less each is bent to the statistics alone.
_REFINED_TOGETHER: Final = 128
_ELEMENTS: Final = 2**19  # of their pixels


@dataclass(frozen=True)
class SetPlan:
    """What a synthetic set is made of.

    Attributes:
        count: Images in all.
        refined: Of these, those that are not drawn by the generator but refined from scenes (``refinement.py``).
        steps: Of the refinement.
    """

    count: int
    refined: int = 0
    steps: int = 0

    @classmethod
    def of(cls, count: int, share: float, steps: int) -> Self:
        """Return the plan of a set of which a share, 0 to 1, is refined in so many steps; no step refines none."""
        return cls(count, round(share * count) if steps else 0, steps)

    @property
    def drawn(self) -> int:
        """Images that the generator draws; where there are none, it need not be trained."""
        return self.count - self.refined


@dataclass(frozen=True)
class WrittenSet:
    """A set in the store.

    Attributes:
        artifact: The file.
        label_agreement: Share of the images, 0 to 1, that the teacher takes for what they were made for.
        bn_loss: Mean over the images of L_BNS of the batches that they were made in.
    """

    artifact: artifacts_pb2.Artifact
    label_agreement: float
    bn_loss: float


def batches_of(synthesizer: Synthesizer, plan: SetPlan, on_step: Callable[[], None]) -> Iterator[Batch]:
    """Yield the batches of a set, in its order.

    Drawn images come first, because ranges are set from the first ones, and the moments of both kinds together are
    those of neither. Half of the images held out for measurement are drawn.

    Args:
        synthesizer: The trained generator.
        plan: Of the set.
        on_step: Called before each step of a refinement; what it raises ends the making.
    """
    last = min(plan.drawn, held_out(plan.count) // 2) if plan.refined else 0
    yield from drawn_set(synthesizer, plan.drawn - last)
    yield from _refined_set(synthesizer, plan.refined, plan.steps, on_step)
    yield from drawn_set(synthesizer, last)


def _refined_set(synthesizer: Synthesizer, count: int, steps: int, on_step: Callable[[], None]) -> Iterator[Batch]:
    small = min(_REFINED_TOGETHER, _ELEMENTS // math.prod(synthesizer.input_shape))
    together = max(synthesizer.parameters.batch_size, small)
    while count:
        batch = synthesizer.draw_refined(together, steps, on_step)
        kept = slice(min(count, together))
        count -= kept.stop
        yield replace(batch, images=batch.images[kept], labels=batch.labels[kept], logits=batch.logits[kept])


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
    plan: SetPlan,
    on_progress: Callable[[int], None],
    on_step: Callable[[], None],
) -> WrittenSet:
    """Write "images" N×C×H×W, "labels" N and "logits" N×K.

    Args:
        store: Where to.
        synthesizer: The trained generator.
        plan: What to write.
        on_progress: Called with the number of images written, for each batch; what it raises ends the writing.
        on_step: Called before each step of a refinement, likewise.
    """
    labels: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    written = agreeing = 0
    bn_loss = 0.0
    with store.writer("synthetic-set.safetensors", "application/octet-stream") as writer:
        writer.write(_header(plan.count, synthesizer.input_shape, synthesizer.num_classes))
        for batch in batches_of(synthesizer, plan, on_step):
            writer.write(_bytes(batch.images))
            labels.append(batch.labels.cpu())
            logits.append(batch.logits.cpu())
            written += len(batch.labels)
            bn_loss += float(batch.bn_loss) * len(batch.labels)
            agreeing += int((batch.logits.argmax(dim=1) == batch.labels).sum())
            on_progress(written)
        writer.write(_bytes(torch.cat(labels)))
        writer.write(_bytes(torch.cat(logits)))
        return WrittenSet(writer.commit(), agreeing / plan.count, bn_loss / plan.count)


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
