"""Files of the quantizer in the store."""

import hashlib
import json
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
from services.quantizer.learned import ActivationQuantizer
from services.quantizer.student import build_student
from services.quantizer.training import Trainer
from tests.support import networks
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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_student_comes_back_with_its_codes(bits: int, tmp_path: Path) -> None:
    """They depend on what black and white are, which the tensors do not tell."""
    torch.manual_seed(0)
    store = ArtifactStore((tmp_path / "store").as_uri())
    graph = captured(networks.NETWORKS["NarrowStem"](), networks.SHAPE)
    pixels = torch.full((3,), -127 / 128), torch.ones(3)
    quantization = Quantization(weight_bits=4, activation_bits=bits)
    student = build_student(graph, quantization, pixels)
    images = (torch.randint(256, (8, *networks.SHAPE)) - 127) / 128
    calibrate(student, images)
    loaded, _ = load_student(
        store.local_path(save_student(store, student, quantization, DIGEST, pixels).digest), graph, DIGEST
    )
    ranges = [
        [(name, m.code_range, m.learns) for name, m in of.named_modules() if isinstance(m, ActivationQuantizer)]
        for of in (student, loaded)
    ]
    assert ranges[0] == ranges[1]
    assert (ranges[0][0][1].lo, ranges[0][0][1].hi) == (-127, 128)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))


def test_activations_of_a_version_with_other_codes_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = captured(Residual(), (3, 8, 8))
    store = ArtifactStore((tmp_path / "store").as_uri())
    quantization = Quantization(weight_bits=4, activation_bits=8)
    student = build_student(graph, quantization)
    now = store.local_path(save_student(store, student, quantization, DIGEST).digest)
    with safe_open(now, framework="pt") as file:
        metadata = file.metadata()
    codes = json.loads(metadata["codes"])
    others = [{**codes, name: [lo, hi - 1]} for name, (lo, hi) in codes.items()]
    for changed in [*(json.dumps(other) for other in others), "{}", "null"]:
        save_file(load_file(now), tmp_path / "earlier", metadata | {"codes": changed})
        with pytest.raises(InvalidArgumentError, match=r"activations of an earlier version.* quantize it again"):
            load_student(tmp_path / "earlier", graph, DIGEST)
    for key, broken in (
        ("codes", "{"),
        ("pixels", "[[0.0]]"),
        ("pixels", '"black"'),
        ("pixels", "[[0.0, 1.0], [1.0, 2.0]]"),
    ):
        save_file(load_file(now), tmp_path / "broken", metadata | {key: broken})
        with pytest.raises(InvalidArgumentError, match="not a quantized model"):
            load_student(tmp_path / "broken", graph, DIGEST)


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
    assert (FORM, digest) == ("quantizer/5", "17636e34ae52"), "give FORM another number, then note both here"
