"""Every format gives the same kind of graph, with the same numbers."""

import gzip
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from granq.v1 import common_pb2
from services.common.models import summarize
from services.common.models.cifar_resnet import resnet20
from tests.support.models import Residual, settle
from tests.support.pt2 import export


def _logits(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(x)
    return result


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "checkpoint"])
def test_named_architecture(kind: str, tmp_path: Path, load: Any) -> None:
    model = settle(resnet20(num_classes=7, in_channels=1))
    path = tmp_path / "w"
    match kind:
        case "safetensors":
            save_file(model.state_dict(), path)
        case "state_dict":
            torch.save(model.state_dict(), path)
        case _:
            torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    loaded = load(path, architecture="resnet20", input_shape=(1, 16, 16))
    assert (loaded.num_classes, loaded.input_shape) == (7, (1, 16, 16))
    x = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(_logits(loaded.module, x), _logits(model, x))


def test_torchvision_weights(tmp_path: Path, load: Any) -> None:
    model = settle(torchvision.models.shufflenet_v2_x0_5(num_classes=12))
    save_file(model.state_dict(), tmp_path / "w")
    loaded = load(tmp_path / "w", architecture="shufflenet_v2_x0_5", input_shape=(3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(_logits(loaded.module, x), _logits(model, x))


def test_normalization_says_what_black_and_white_are(archive: Path, load: Any) -> None:
    assert load(archive).pixel_range is None
    given = common_pb2.Normalization(mean=[0.5, 0.4, 0.25], std=[0.25])
    black, white = load(archive, normalization=given).pixel_range
    torch.testing.assert_close(black, torch.tensor([-2.0, -1.6, -1.0]))
    torch.testing.assert_close(white, torch.tensor([2.0, 2.4, 3.0]))
    black, white = load(archive, normalization=common_pb2.Normalization()).pixel_range
    assert (black.tolist(), white.tolist()) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("dynamic", [True, False])
def test_exported(dynamic: bool, tmp_path: Path, load: Any) -> None:
    """With a fixed batch and core ATen operators too, the graph takes any batch."""
    model = settle(torchvision.models.mobilenet_v3_small(num_classes=10))
    loaded = load(export(model, (3, 32, 32), tmp_path / "m.pt2", dynamic=dynamic))
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(_logits(loaded.module, x), _logits(model, x), rtol=1e-4, atol=1e-4)
    kinds = {type(module) for module in loaded.module.modules()}
    assert {nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Hardswish, nn.Hardsigmoid, nn.Flatten} <= kinds
    assert loaded.module.get_submodule("features.0.0").weight.shape == (16, 3, 3, 3)


def test_exported_in_training_mode(tmp_path: Path, load: Any) -> None:
    model = settle(Residual()).train()
    path = export(model, (3, 8, 8), tmp_path / "m.pt2", dynamic=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(_logits(load(path).module, x), _logits(model.eval(), x))


def test_exported_with_names_that_are_no_identifiers(tmp_path: Path, load: Any) -> None:
    """torchvision calls the blocks of a RegNet block1-0 and so on."""
    model = settle(nn.Sequential(OrderedDict({"block1-0": Residual()})))
    loaded = load(export(model, (3, 8, 8), tmp_path / "m.pt2"))
    assert isinstance(loaded.module.get_submodule("block1-0.stem.0"), nn.Conv2d)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(_logits(loaded.module, x), _logits(model, x))


def test_summary(archive: Path, load: Any) -> None:
    summary = summarize(load(archive))
    assert summary.format == common_pb2.MODEL_FORMAT_TORCH_EXPORT
    assert list(summary.input_shape) == [3, 8, 8]
    assert summary.batch_norm_layers == 5
    layers = {layer.name: layer for layer in summary.layers}
    assert set(layers) == {"stem.0", "body.0", "body.3", "down.0", "project.0", "fc"}
    assert layers["stem.0"].multiply_adds == 8 * 8 * 8 * 3 * 9
    assert layers["down.0"].multiply_adds == 4 * 4 * 16 * 8 * 9
    assert layers["fc"].multiply_adds == 160
    assert summary.parameters == sum(p.numel() for p in Residual().parameters())


def test_model_of_others(shared_data: Path, load: Any) -> None:
    path = shared_data / "fmnist_resnet20.pt2"
    reference = torch.export.load(path).module()
    loaded = load(path)
    assert (loaded.input_shape, loaded.num_classes) == ((3, 32, 32), 10)
    assert isinstance(loaded.module.get_submodule("features.stage1.unit1.body.conv1.conv"), nn.Conv2d)
    x = torch.randn(4, 3, 32, 32)
    assert float((_logits(loaded.module, x) - _logits(reference, x)).abs().max()) < 1e-5


def test_accuracy_of_the_model_of_others(shared_data: Path, fashion_mnist: Path, load: Any) -> None:
    module = load(shared_data / "fmnist_resnet20.pt2").module
    raw = gzip.decompress((fashion_mnist / "t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(raw, np.uint8, 500 * 784, 16).reshape(500, 1, 28, 28).astype(np.float32)
    labels = np.frombuffer(
        gzip.decompress((fashion_mnist / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, 500, 8
    )
    images = np.pad(
        (pixels / 255 - 0.2860) / 0.3530, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-0.2860 / 0.3530
    )
    x = torch.from_numpy(np.repeat(images, 3, axis=1).astype(np.float32))
    assert float((_logits(module, x).argmax(1).numpy() == labels).mean()) > 0.9
