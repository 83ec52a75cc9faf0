"""Draws some images of each class of a synthetic set, for people to look at."""

import io
from pathlib import Path
from typing import Final

import torch
from PIL import Image, ImageDraw, PngImagePlugin
from safetensors import safe_open

from services.generator.networks import ConditionalGenerator, Pixels

CLASSES: Final = 50
IMAGES: Final = 10
SIDE: Final = 64  # of a cell; larger images are reduced to it, small ones enlarged by whole factors
_GAP, _LABEL = 4, 40
_SAMPLE = 64  # images that the range of unbounded pixels is taken from
_PAPER, _INK, _OTHER = (255, 255, 255), (40, 40, 40), (200, 30, 30)


def draw_grid(path: Path, generator: ConditionalGenerator) -> bytes:
    """Return a PNG with a row for each of the first 50 classes that occur, and the first 10 images of each in it.

    A frame marks images that the teacher takes for another class. Pixels go from black to white where the generator
    knows them, else from the 1st to the 99th percentile of the values; the file's text field "pixels" says which.

    Args:
        path: The set that ``write_set`` wrote.
        generator: What made it.
    """
    with safe_open(path, framework="pt") as file:
        labels, logits = file.get_tensor("labels"), file.get_tensor("logits")
        images = file.get_slice("images")
        classes = sorted(set(labels.tolist()))[:CLASSES]
        rows = {label: torch.nonzero(labels == label).flatten()[:IMAGES].tolist() for label in classes}
        shown = [index for row in rows.values() for index in row]
        low, high, note = _range(generator, torch.stack([images[index] for index in shown[:_SAMPLE]]))
        right = logits.argmax(1) == labels
        cells = {index: _cell(images[index], low, high, bool(right[index])) for index in shown}
    step = SIDE + 2 * _GAP
    canvas = Image.new("RGB", (_LABEL + IMAGES * step, step * len(rows)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for row, (label, indices) in enumerate(rows.items()):
        pen.text((6, row * step + step // 2 - 6), str(label), _INK)
        for column, index in enumerate(indices):
            canvas.paste(cells[index], (_LABEL + column * step, row * step))
    text = PngImagePlugin.PngInfo()
    text.add_text("pixels", note)
    text.add_text("classes", f"{len(rows)} of {logits.shape[1]}")
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True, pnginfo=text)
    return buffer.getvalue()


def _range(generator: ConditionalGenerator, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return what black and white are, C×1×1 or 1×1×1 each, and how that is known."""
    if isinstance(generator.output, Pixels):
        centre, amplitude = generator.output.centre[0].cpu(), generator.output.amplitude[0].cpu()
        return centre - amplitude, centre + amplitude, "black to white"
    values = sample.flatten()
    values = values[:: max(1, values.numel() // 1_000_000)]  # torch.quantile takes no more than 16 million
    ends = torch.quantile(values, torch.tensor([0.01, 0.99]))
    return ends[0].view(1, 1, 1), ends[1].view(1, 1, 1), "1 % to 99 % of the values"


def _cell(image: torch.Tensor, low: torch.Tensor, high: torch.Tensor, right: bool) -> Image.Image:
    """Return one image C×H×W as a square cell with its margin."""
    scaled = ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    if scaled.shape[0] not in (1, 3):
        scaled = scaled.mean(0, keepdim=True)
    pixels = (scaled * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    longest = max(picture.size)
    if longest > SIDE:
        picture.thumbnail((SIDE, SIDE))
    else:
        factor = SIDE // longest
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    cell = Image.new("RGB", (SIDE + 2 * _GAP, SIDE + 2 * _GAP), _PAPER)
    corner = ((cell.width - picture.width) // 2, (cell.height - picture.height) // 2)
    if not right:
        frame = (corner[0] - 2, corner[1] - 2, corner[0] + picture.width + 1, corner[1] + picture.height + 1)
        ImageDraw.Draw(cell).rectangle(frame, outline=_OTHER, width=2)
    cell.paste(picture, corner)
    return cell
