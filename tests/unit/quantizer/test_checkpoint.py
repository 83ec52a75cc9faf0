"""Files of the quantizer in the store."""

from pathlib import Path

import torch

from services.common.artifacts import ArtifactStore
from services.quantizer.checkpoint import load_student, save_student
from services.quantizer.config import Quantization
from services.quantizer.student import build_student
from tests.support.models import Residual, captured

DIGEST = "sha256:" + "a" * 64


def test_the_same_student_is_always_the_same_artifact(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = ArtifactStore((tmp_path / "store").as_uri())
    graph = captured(Residual(), (3, 8, 8))
    quantization = Quantization(weight_bits=4, activation_bits=4)
    student = build_student(graph, quantization)
    saved = [save_student(store, student, quantization, DIGEST) for _ in range(12)]
    assert len({artifact.digest for artifact in saved}) == 1
    loaded, formats = load_student(store.local_path(saved[0].digest), graph, DIGEST)
    assert formats == quantization
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
