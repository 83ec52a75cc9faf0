"""Draws the diagnostics of a training: its losses, and the noise of each layer before and after it."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

WIDTH, PANEL, MARGIN = 960, 280, 56
INK, GRID, SHADE = (40, 40, 40), (225, 225, 225), (244, 244, 236)
BLUE, ORANGE, GREY = (31, 96, 180), (214, 110, 20), (150, 150, 150)
TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line of a panel; None interrupts it."""

    name: str
    colour: tuple[int, int, int]
    x: Sequence[float]
    y: Sequence[float | None]


def draw(diagnostics: dict[str, Any]) -> bytes:
    """Return a PNG of ``diagnostics.summary``'s figures; panels without figures are left out."""
    curve, layers = diagnostics["curve"], diagnostics["layers"]
    panels: list[tuple[str, list[Series], bool, float]] = []
    x, warm = curve["iteration"], float(curve["warmup_iterations"])
    if x:
        student = Series("student", BLUE, x, curve["loss_student"])
        panels.append(("Distillation loss over iterations (shaded: warm-up)", [student], True, warm))
    if x and curve["loss_generator"]:
        generator = Series("generator", ORANGE, x, curve["loss_generator"])
        panels.append(("Generator's loss, without its BatchNorm term", [generator], False, warm))
    numbers = [float(number) for number in range(1, len(layers) + 1)]
    ratios = [
        Series(when, colour, numbers, [(layer[when] or {}).get("sqnr_db") for layer in layers])
        for when, colour in (("before", GREY), ("after", BLUE))
    ]
    panels.append((f"SQNR in dB of each layer, on {diagnostics['images']} held-out images", ratios, False, 0.0))
    canvas = Image.new("RGB", (WIDTH, PANEL * len(panels)), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (title, series, logarithmic, shaded) in enumerate(panels):
        _panel(pen, index * PANEL, title, series, logarithmic, shaded)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _panel(
    pen: ImageDraw.ImageDraw, top: int, title: str, series: list[Series], logarithmic: bool, shaded: float
) -> None:
    left, right = MARGIN, WIDTH - MARGIN // 2
    head, foot = top + MARGIN // 2 + 12, top + PANEL - MARGIN // 2
    pen.text((left, top + 10), title, INK)
    values = [value for line in series for value in line.y if value is not None and math.isfinite(value)]
    if not values:
        pen.text((left, head), "no figures", GREY)
        return
    logarithmic = logarithmic and min(values) > 0
    low, high = _scaled(min(values), logarithmic), _scaled(max(values), logarithmic)
    # A flat line lies in the middle.
    pad = 0.05 * (high - low) or 0.5
    low, high = low - pad, high + pad
    first, last = min(min(line.x) for line in series), max(max(line.x) for line in series)
    span = last - first or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * (x - first) / span
        return across, foot - (foot - head) * (_scaled(y, logarithmic) - low) / (high - low)

    if shaded > first:
        pen.rectangle((left, head, left + (right - left) * min(1.0, (shaded - first) / span), foot), SHADE)
    for tick in range(TICKS):
        value = low + (high - low) * tick / (TICKS - 1)
        height = foot - (foot - head) * tick / (TICKS - 1)
        pen.line((left, height, right, height), GRID)
        pen.text((4, height - 6), f"{10**value if logarithmic else value:.3g}", INK)
        across = left + (right - left) * tick / (TICKS - 1)
        pen.text((across - 8, foot + 4), f"{first + span * tick / (TICKS - 1):.0f}", INK)
    for number, line in enumerate(series):
        pen.text((right - 80 * (len(series) - number), top + 10), line.name, line.colour)
        _line(pen, [None if y is None else place(x, y) for x, y in zip(line.x, line.y, strict=True)], line.colour)


def _line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float] | None], colour: tuple[int, int, int]) -> None:
    run: list[tuple[float, float]] = []
    for point in [*points, None]:
        if point is not None:
            run.append(point)
            continue
        if len(run) > 1:
            pen.line(run, colour, 2)
        for x, y in run if len(points) <= 100 else ():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        run = []


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log10(value) if logarithmic else value
