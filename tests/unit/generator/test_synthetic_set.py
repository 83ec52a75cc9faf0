from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from services.common.artifacts import ArtifactStore
from services.common.synthetic import held_out
from services.generator.synthesis import Batch, SynthesisParameters, Synthesizer
from services.generator.synthetic_set import SetPlan, batches_of, drawn_set, write_set
from tests.support.models import Residual, captured

SHAPE = (3, 8, 8)


@pytest.mark.parametrize("count", [1, 6, 20])
def test_set(count: int, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    teacher = captured(Residual(), SHAPE)
    synthesizer = Synthesizer(teacher, SHAPE, 10, SynthesisParameters(batch_size=6), torch.device("cpu"))
    progress: list[int] = []
    written = write_set(store, synthesizer, SetPlan(count), progress.append, lambda: None)
    tensors = load(store.read_bytes(written.artifact.digest))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "images": (count, 3, 8, 8),
        "labels": (count,),
        "logits": (count, 10),
    }
    assert tensors["labels"].dtype == torch.int64
    assert progress[-1] == count
    assert written.label_agreement == pytest.approx(
        float((tensors["logits"].argmax(1) == tensors["labels"]).float().mean())
    )
    with torch.no_grad():
        torch.testing.assert_close(teacher(tensors["images"]), tensors["logits"], rtol=1e-4, atol=1e-4)
    # An untrained generator meets one label in ten; drawing more than needed raises that.
    if count == 20:
        assert written.label_agreement > 0.2


class Drawn(Synthesizer):
    """Has no generator: the teacher takes each image for another label than its own with the given probability."""

    def __init__(self, batch_size: int, wrong: float) -> None:
        self.parameters = SynthesisParameters(batch_size)
        self.input_shape = (1, 1, 1)
        self.num_classes = 3
        self.draws = 0
        self._wrong = wrong
        self._noise = torch.Generator().manual_seed(0)

    def draw(self, *, train: bool = True) -> Batch:
        assert not train
        size = self.parameters.batch_size
        labels = torch.randint(3, (size,), generator=self._noise)
        named = (labels + (torch.rand(size, generator=self._noise) < self._wrong)) % 3
        images = torch.arange(size).float().view(-1, 1, 1, 1) + size * self.draws
        self.draws += 1
        return Batch(0, images, labels, torch.nn.functional.one_hot(named, 3).float(), torch.zeros(()))


@pytest.mark.parametrize(("wrong", "draws"), [(0.0, 16), (0.5, 34)])
def test_images_that_the_teacher_takes_for_what_they_are_suffice(wrong: float, draws: int) -> None:
    drawn = Drawn(64, wrong)
    kept = list(drawn_set(drawn, 1000))
    assert len(torch.cat([batch.images for batch in kept]).unique()) == 1000
    assert all(bool((batch.logits.argmax(1) == batch.labels).all()) for batch in kept)
    assert drawn.draws <= draws


def test_the_draws_end_at_four_times_what_is_needed() -> None:
    drawn = Drawn(16, 1.0)
    kept = list(drawn_set(drawn, 100))
    assert len(torch.cat([batch.images for batch in kept]).unique()) == 100
    assert drawn.draws == 4 * 7


class Marking(Drawn):
    """Marks refined images by values from a thousand."""

    def draw_refined(self, count: int, steps: int, on_step: Callable[[], None] = lambda: None) -> Batch:
        self.refined_together = count
        for _ in range(steps):
            on_step()
        labels = torch.arange(count) % 3
        images = torch.full((count, 1, 1, 1), 1000.0)
        return Batch(0, images, labels, torch.nn.functional.one_hot(labels, 3).float(), torch.zeros(()))


@pytest.mark.parametrize(("count", "share"), [(200, 0.5), (200, 1.0), (200, 0.0), (7, 0.5), (1, 0.5), (1, 1.0)])
def test_refined_images_lie_between_drawn_ones(count: int, share: float) -> None:
    drawn = Marking(16, 0.0)
    plan = SetPlan.of(count, share, 3)
    batches = list(batches_of(drawn, plan, lambda: None))
    images = torch.cat([batch.images for batch in batches])
    assert len(images) == sum(len(batch.labels) for batch in batches) == sum(len(b.logits) for b in batches) == count
    marked = (images >= 1000).flatten()
    assert int(marked.sum()) == plan.refined == round(share * count)
    if plan.refined:
        assert drawn.refined_together == 128  # images of one pixel: as many as are refined at once
        kept = held_out(count)
        first, last = int(marked.nonzero()[0]), int(marked.nonzero()[-1])
        assert bool(marked[first : last + 1].all())
        assert count - 1 - last == min(count - plan.refined, kept // 2)


def test_no_step_refines_nothing() -> None:
    assert SetPlan.of(10, 0.5, 0) == SetPlan(10, 0, 0)
    assert SetPlan.of(10, 1.0, 0).drawn == 10
    assert SetPlan.of(10, 1.0, 1).drawn == 0


def test_a_refinement_can_be_stopped(tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    store = ArtifactStore(tmp_path.as_uri())
    with pytest.raises(InterruptedError):
        write_set(store, Marking(16, 0.0), SetPlan(8, 8, 1), lambda written: None, stop)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
