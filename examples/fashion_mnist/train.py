"""Train the example model: ResNet-20 on the Fashion-MNIST training set, on CPU or GPU.

    python examples/fashion_mnist/train.py --data /usr/share/datasets/fashion-mnist

Writes resnet20.safetensors and resnet20.pt2 next to this file and prints the test accuracy of the last epoch (no
selection on the test set). Images are 1×28×28, (x/255 − 0.2860)/0.3530.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from services.common.models.cifar_resnet import CifarResNet, resnet20

MEAN, STD = 0.2860, 0.3530
HERE = Path(__file__).parent


def read_idx(path: Path) -> np.ndarray:
    """Read a gzip-compressed IDX file of unsigned bytes (the format of MNIST) of any rank."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(folder: Path, split: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalized images N×1×28×28 float32 and labels N int64 of "train" or "t10k"."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz").astype(np.float32)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)
    x = torch.from_numpy((images / 255.0 - MEAN) / STD).unsqueeze(1)
    return x.to(device), torch.from_numpy(labels).to(device)


def augment(x: torch.Tensor, generator: torch.Generator, pad: int = 2, erase: int = 8) -> torch.Tensor:
    """Random shift by up to ``pad`` pixels, mirror, and erase a square, per image, without a loop."""
    n, _, h, w = x.shape
    black = -MEAN / STD
    padded = F.pad(x, (pad, pad, pad, pad), value=black)
    dy = torch.randint(0, 2 * pad + 1, (n, 1, 1), generator=generator)
    dx = torch.randint(0, 2 * pad + 1, (n, 1, 1), generator=generator)
    flip = torch.rand(n, 1, 1, generator=generator) < 0.5
    rows = torch.arange(h).view(1, h, 1) + dy
    cols = torch.arange(w).view(1, 1, w).expand(n, 1, w)
    cols = torch.where(flip, w - 1 - cols, cols) + dx
    batch = torch.arange(n).view(n, 1, 1)
    out = padded[batch, 0, rows, cols].unsqueeze(1)
    cy = torch.randint(0, h, (n, 1, 1), generator=generator)
    cx = torch.randint(0, w, (n, 1, 1), generator=generator)
    hole = ((torch.arange(h).view(1, h, 1) - cy).abs() < erase // 2) & (
        (torch.arange(w).view(1, 1, w) - cx).abs() < erase // 2
    )
    erased: torch.Tensor = torch.where(hole.unsqueeze(1), torch.tensor(black), out)
    return erased


@torch.no_grad()
def accuracy(model: CifarResNet, x: torch.Tensor, y: torch.Tensor) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    hits = sum(int((model(xb).argmax(1) == yb).sum()) for xb, yb in zip(x.split(500), y.split(500), strict=True))
    return 100.0 * hits / len(x)


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = load_split(args.data, "train", torch.device("cpu"))
    x_test, y_test = load_split(args.data, "t10k", device)
    model = resnet20(num_classes=10, in_channels=1).to(memory_format=torch.channels_last).to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(x) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.25)
    rng = torch.Generator().manual_seed(args.seed)
    for epoch in range(args.epochs):
        model.train()
        start, total = time.monotonic(), 0.0
        order = torch.randperm(len(x), generator=rng)[: steps * args.batch].view(steps, args.batch)
        for index in order:
            images = augment(x[index], rng).to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), y[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        top1 = accuracy(model, x_test, y_test)
        print(
            f"epoch {epoch + 1:2d}  loss {total / steps:.4f}  test top-1 {top1:.2f} %"
            f"  {time.monotonic() - start:.0f} s",
            flush=True,
        )
    model = model.cpu().to(memory_format=torch.contiguous_format).eval()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        HERE / "resnet20.safetensors",
        metadata={"architecture": "resnet20", "num_classes": "10", "in_channels": "1"},
    )
    # The archive keeps the example's whole storage, so it must be no slice of the test set.
    example = torch.zeros(2, *x_test.shape[1:])
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, HERE / "resnet20.pt2")


if __name__ == "__main__":
    main()
