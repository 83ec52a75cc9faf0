"""Trains more networks for the tables: torchvision's architectures, small, on Fashion-MNIST, minutes of one CPU core.

python -m benchmarks.networks mobilenet_v2 regnet_y --data /usr/share/datasets/fashion-mnist --out FOLDER

Writes one .pt2 program per network. Their input is 3×32×32: the gray image, two black pixels wider on each side and
repeated, (x/255 − 0.2860)/0.3530.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.regnet import BlockParams, RegNet

from granq.v1 import common_pb2
from services.common.artifacts import ArtifactStore
from services.common.datasets import open_dataset

MEAN, STD, PAD = 0.2860, 0.3530, 2
SHAPE = (3, 28 + 2 * PAD, 28 + 2 * PAD)
CLASSES = 10
WEIGHT_DECAY = 5e-4
WARM_UP = 0.25  # of the iterations, in which the rate rises
SHIFT = 2  # pixels, at most


def mobilenet_v2() -> nn.Module:
    """Inverted residuals with ReLU6, 12 blocks, half as wide as published."""
    blocks = [[1, 16, 1, 2], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 3, 2], [6, 96, 2, 1], [6, 160, 1, 1]]
    return _with_stem(MobileNetV2(CLASSES, width_mult=0.5, inverted_residual_setting=blocks, dropout=0.0))


def regnet_y() -> nn.Module:
    """Group convolutions with squeeze-excite, 8 blocks of 24 to 256 channels."""
    blocks = BlockParams.from_init_params(depth=8, w_0=24, w_a=24, w_m=2.2, group_width=8, se_ratio=0.25)
    return _with_stem(RegNet(blocks, CLASSES))


def densenet() -> nn.Module:
    """Three blocks of four layers, each of which adds 12 channels to what it reads."""
    network: nn.Module = DenseNet(12, (4, 4, 4), num_init_features=24, num_classes=CLASSES)
    network.get_submodule("features").add_module("conv0", nn.Conv2d(3, 24, 3, padding=1, bias=False))
    return network


def _with_stem(network: nn.Module) -> nn.Module:
    """Let the first convolution keep the resolution of images that are small already."""
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    stem.stride = (1, 1)
    return network


@dataclass(frozen=True)
class Recipe:
    """How a network is made and trained.

    Attributes:
        build: Makes it, with random weights.
        epochs: Passes over the training set.
        rate: Largest learning rate.
    """

    build: Callable[[], nn.Module]
    epochs: int
    rate: float = 0.2


NETWORKS = {
    "mobilenet_v2": Recipe(mobilenet_v2, epochs=5),
    "regnet_y": Recipe(regnet_y, epochs=5),
    "densenet": Recipe(densenet, epochs=5),
}


def read(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the images of "train" or "t10k", float32 N×1×32×32 as the networks see them, and labels, int64 N.

    They come through the reader and the preprocessing that the networks are measured with.
    """
    dataset = common_pb2.Dataset(
        path=data.name,
        format=common_pb2.DATASET_FORMAT_IDX,
        split=split,
        preprocessing=common_pb2.Preprocessing(pad=PAD, mean=[MEAN], std=[STD]),
    )
    parts = list(open_dataset(dataset, data.parent, ArtifactStore("memory://")).images(5000))
    images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    return images, labels


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return N×C×H×W images, each mirrored or not and shifted by up to ``SHIFT`` pixels over black."""
    n, _, height, width = images.shape
    wide = F.pad(images, (SHIFT,) * 4, value=-MEAN / STD)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n, 1, 1), generator=generator)
    columns = torch.arange(width).view(1, 1, width).expand(n, 1, width)
    mirrored = torch.rand(n, 1, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns) + right
    rows = torch.arange(height).view(1, height, 1) + down
    # Indices around a slice put the sliced axis, the channels, last.
    return wide[torch.arange(n).view(n, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, SHAPE[0], -1, -1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy on N×1×32×32 images, in percent."""
    network.eval()
    chosen = torch.cat([network(_coloured(part)).argmax(1) for part in images.split(500)])
    return float((chosen == labels).double().mean() * 100)


def train(
    recipe: Recipe, images: Tensor, labels: Tensor, batch: int, seed: int, report: Callable[[int, float], None]
) -> nn.Module:
    """Return a network trained on N×1×32×32 images, in eval mode.

    ``report`` takes the epochs done and the last one's mean loss, after each.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = recipe.build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.rate, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, recipe.epochs * steps, pct_start=WARM_UP)
    for epoch in range(recipe.epochs):
        network.train()
        total = 0.0
        for index in torch.randperm(len(images), generator=generator)[: steps * batch].view(steps, batch):
            loss = F.cross_entropy(network(_coloured(augmented(images[index], generator))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        report(epoch + 1, total / steps)
    return network.eval()


def save(network: nn.Module, path: Path) -> None:
    """Write a network in eval mode as a .pt2 program of any batch size."""
    example = torch.zeros(2, *SHAPE)
    batch = {0: torch.export.Dim("batch", min=1)}
    network = network.to(memory_format=torch.contiguous_format)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=(batch,)), path)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NETWORKS)}; default: all.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of IDX files.")] = Path("/usr/share/datasets/fashion-mnist"),
    out: Annotated[Path, typer.Option(help="Folder to write NAME.pt2 to.")] = Path(),
    epochs: Annotated[int, typer.Option(help="Passes over the training set; 0 for the network's own number.")] = 0,
    batch: Annotated[int, typer.Option(help="Images in an iteration.")] = 128,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train networks and save them as .pt2; the accuracy is that of the last epoch, none is chosen on the test set."""
    unknown = sorted(set(names or []) - set(NETWORKS))
    if unknown:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}; there are {', '.join(NETWORKS)}")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    training, test = (read(data, split) for split in ("train", "t10k"))
    for name in names or NETWORKS:
        start = time.monotonic()

        def report(epoch: int, loss: float, name: str = name, start: float = start) -> None:
            print(f"{name}  epoch {epoch}  loss {loss:.4f}  {time.monotonic() - start:.0f} s", flush=True)

        recipe = NETWORKS[name]
        network = train(replace(recipe, epochs=epochs or recipe.epochs), *training, batch, seed, report)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"{name}  {parameters:,} parameters  test top-1 {top1(network, *test):.2f} %", flush=True)
        save(network, out / f"{name}.pt2")


if __name__ == "__main__":
    typer.run(main)
