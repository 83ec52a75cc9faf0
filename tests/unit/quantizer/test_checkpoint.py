"""Files of the quantizer in the store."""

import hashlib
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError
from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.calibrate import calibrate
from services.quantizer.checkpoint import FORM, load_student, save_checkpoint, save_student
from services.quantizer.config import GeneratorLosses, Quantization, Training
from services.quantizer.student import build_student
from services.quantizer.training import Trainer
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


def test_weights_of_a_version_with_other_codes_are_refused(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, str], Collection[int]]] = [
        ({}, {2, 3}),
        ({"two_bits": "-3 -1 1 3"}, {3}),
        ({"odd_codes_up_to": "4"}, {4}),
        ({"odd_codes_up_to": "3"}, {}),
    ]
    torch.manual_seed(0)
    graph = captured(Residual(), (3, 8, 8))
    store = ArtifactStore((tmp_path / "store").as_uri())
    for bits in (2, 3, 4):
        quantization = Quantization(weight_bits=bits, activation_bits=8)
        student = build_student(graph, quantization)
        calibrate(student, torch.randn(4, 3, 8, 8))
        now = store.local_path(save_student(store, student, quantization, DIGEST).digest)
        load_student(now, graph, DIGEST)
        earlier = tmp_path / f"earlier{bits}"
        with safe_open(now, framework="pt") as file:
            metadata = file.metadata()
        del metadata["odd_codes_up_to"]
        for said, widths in refused:
            save_file(load_file(now), earlier, metadata | said)
            if bits in widths:
                with pytest.raises(InvalidArgumentError, match=f"{bits}-bit weights .* quantize it again"):
                    load_student(earlier, graph, DIGEST)
            else:
                load_student(earlier, graph, DIGEST)
    save_file(load_file(now), earlier, metadata | {"odd_codes_up_to": "three"})
    with pytest.raises(InvalidArgumentError, match="not a quantized model"):
        load_student(earlier, graph, DIGEST)


def test_a_checkpoint_that_holds_something_else_has_another_form(tmp_path: Path) -> None:
    """A worker of another version may find it: then it must begin anew, and not fail or train something else."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (3, 8, 8)
    student = build_student(captured(Residual(), shape), Quantization(weight_bits=4, activation_bits=4))
    images = Batch(torch.randn(8, *shape), torch.randint(0, 10, (8,)), torch.randn(8, 10))
    calibrate(student, images.images)
    training = Training(
        co_train=False,
        epochs=1,
        iterations_per_epoch=2,
        warmup_epochs=0,
        batch_size=4,
        learning_rate=0.01,
        feature_weight=0.0,
    )
    source = ReplaySource(images, training.batch_size, training.seed, torch.device("cpu"))
    trainer = Trainer(student, training, GeneratorLosses(), source)
    for _ in trainer.run(lambda progress: None):
        pass
    store = ArtifactStore((tmp_path / "store").as_uri())
    saved = save_checkpoint(store, trainer, 1.0, {})
    with safe_open(store.local_path(saved.artifact.digest), framework="pt") as file:
        content = sorted([*file.keys(), *(f"metadata {key}" for key in file.metadata())])
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()[:12]
    assert (FORM, digest) == ("quantizer/4", "17636e34ae52"), "give FORM another number, then note both here"
