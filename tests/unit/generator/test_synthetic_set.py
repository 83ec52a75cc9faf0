from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from services.common.artifacts import ArtifactStore
from services.generator.synthesis import SynthesisParameters, Synthesizer
from services.generator.synthetic_set import write_set
from tests.support.models import Residual, captured

SHAPE = (3, 8, 8)


@pytest.mark.parametrize("count", [1, 6, 20])
def test_set(count: int, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    teacher = captured(Residual(), SHAPE)
    synthesizer = Synthesizer(teacher, SHAPE, 10, SynthesisParameters(batch_size=6), torch.device("cpu"))
    progress: list[int] = []
    artifact, agreement = write_set(store, synthesizer, count, progress.append)
    tensors = load(store.read_bytes(artifact.digest))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "images": (count, 3, 8, 8),
        "labels": (count,),
        "logits": (count, 10),
    }
    assert tensors["labels"].dtype == torch.int64
    assert progress[-1] == count
    assert agreement == pytest.approx(float((tensors["logits"].argmax(1) == tensors["labels"]).float().mean()))
    with torch.no_grad():
        torch.testing.assert_close(teacher(tensors["images"]), tensors["logits"], rtol=1e-4, atol=1e-4)
    # An untrained generator meets one label in ten; drawing more than needed raises that.
    if count == 20:
        assert agreement > 0.2
