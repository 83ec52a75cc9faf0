"""Options that the commands of the tables share."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.accuracy.bench import Bench
from granq.v1 import common_pb2

Model = Annotated[Path, typer.Option(help="A .pt2 program.")]
Data = Annotated[Path, typer.Option(help="Folder of IDX files.")]
Mean = Annotated[float, typer.Option(help="Of pixels/255.")]
Std = Annotated[float, typer.Option(help="Of pixels/255.")]
Pad = Annotated[int, typer.Option(help="Black pixels on each side.")]
Channels = Annotated[int, typer.Option(help="1 or 3.")]
Limit = Annotated[int, typer.Option(help="Only the first so many test images; 0 for all.")]
Seeds = Annotated[str, typer.Option(help="Separated by commas.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Out = Annotated[Path | None, typer.Option(help="Markdown file to write, after each row.")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist" / "resnet20.pt2"


def pairs_of(bits: list[str]) -> list[tuple[int, int]]:
    """Return (weight, activation) bits of texts such as "4/8"."""
    return [(int(weight), int(activation)) for weight, activation in (pair.split("/") for pair in bits)]


def open_bench(
    model: Path, data: Path, mean: float, std: float, pad: int, channels: int, limit: int, folder: str, *, bounded: bool
) -> Bench:
    """Open the test images of a folder of IDX files as the options say; ``folder`` is for files of the run."""
    preprocessing = common_pb2.Preprocessing(pad=pad, channels=channels, mean=[mean], std=[std])
    dataset = common_pb2.Dataset(
        path=data.name,
        format=common_pb2.DATASET_FORMAT_IDX,
        split="t10k",
        preprocessing=preprocessing,
        limit=limit,
    )
    return Bench.open(model, dataset, data.parent, Path(folder), bounded=bounded)
