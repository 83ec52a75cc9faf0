import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer

from benchmarks.accuracy.bench import load
from benchmarks.networks import CLASSES, MEAN, NETWORKS, SHAPE, STD, Recipe, augmented, main, read, save, top1, train
from services.quantizer.config import Quantization
from services.quantizer.student import build_student

BLACK = -MEAN / STD


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_trained_network_is_read_and_becomes_a_student(tmp_path: Path) -> None:
    """Of the networks, the RegNet has the oddest names and operations."""
    data = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, *SHAPE[1:], generator=data)
    labels = torch.randint(0, CLASSES, (32,), generator=data)
    told: list[tuple[int, float]] = []
    network = train(Recipe(NETWORKS["regnet_y"].build, epochs=2), images, labels, 8, 0, lambda *news: told.append(news))
    assert [epoch for epoch, _ in told] == [1, 2]
    save(network, tmp_path / "regnet_y.pt2")
    loaded = load(tmp_path / "regnet_y.pt2", tmp_path, None)
    assert (loaded.input_shape, loaded.num_classes) == (SHAPE, CLASSES)
    with torch.no_grad():
        logits = loaded.module(images.expand(-1, SHAPE[0], -1, -1))
        torch.testing.assert_close(logits, network(images.expand(-1, SHAPE[0], -1, -1)), rtol=1e-4, atol=1e-4)
    assert top1(network, images, logits.argmax(1)) == 100
    build_student(loaded.module, Quantization(4, 4))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn(name: str) -> None:
    """Two images that differ in brightness alone are told apart after a few iterations."""
    images = torch.tensor([-0.8, 1.2]).view(2, 1, 1, 1).expand(2, 1, *SHAPE[1:]).repeat(4, 1, 1, 1)
    labels = torch.tensor([0, 1]).repeat(4)
    losses: list[float] = []
    train(
        Recipe(NETWORKS[name].build, epochs=8, rate=0.02), images, labels, 8, 0, lambda epoch, loss: losses.append(loss)
    )
    assert losses[-1] < 0.5 * losses[0]


def test_augmented_images_are_mirrored_and_shifted_over_black() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6)
    drawn = augmented(image.repeat(200, 1, 1, 1), torch.Generator().manual_seed(0))
    wide = [F.pad(x, (2, 2, 2, 2), value=BLACK)[0, 0] for x in (image, image.flip(3))]
    places = itertools.product(range(2), range(5), range(5))
    candidates = torch.stack([wide[m][down : down + 6, right : right + 6] for m, down, right in places])
    found = (drawn == candidates.unsqueeze(0)).flatten(2).all(2)
    assert found.any(1).all()
    assert found.any(0).sum() > 45  # of the 50 that there are


def test_images_are_read_as_they_are_measured(fashion_mnist: Path) -> None:
    images, labels = read(fashion_mnist, "t10k")
    assert images.shape == (10000, 1, *SHAPE[1:])
    assert labels.bincount().tolist() == [1000] * CLASSES
    torch.testing.assert_close(images[:, :, :2].unique(), torch.tensor([BLACK]))
    torch.testing.assert_close(images.max(), torch.tensor((1 - MEAN) / STD))


def test_unknown_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="alexnet"):
        main(["mobilenet_v2", "alexnet"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
