"""Draws the dashboards of a real run of the four servers: python -m tools.dashboard_pictures [--out docs/pictures].

Grafana itself is not needed: the queries are those of its dashboards, asked of a Prometheus that scrapes the run.
"""

import argparse
import os
import re
import time
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tests.support.dashboards import Query, queries
from tests.support.observed import Observed, observed

mpl.use("agg")
_COLUMNS, _PANEL = 3, (5.0, 2.4)
_NAMED = 8
_WINDOW, _SETTLE_SECONDS = "15s", 5.0
_PERCENT = "percentunit"


def _largest(line: Line2D) -> float:
    return float(np.max(np.asarray(line.get_ydata(), float)))


def _draw(axes: Axes, title: str, asked: list[Query], run: Observed, end: float) -> None:
    for query in asked:
        for series in run.prometheus.query_range(query.promql(_WINDOW), run.begin, end, 1):
            labels = series["metric"]
            name = re.sub(r"\{\{(\w+)\}\}", lambda found, labels=labels: labels.get(found[1], ""), query.legend)  # type: ignore[misc]
            scale = 100 if query.unit == _PERCENT else 1
            values = [(float(at) - run.begin, scale * float(value)) for at, value in series["values"]]
            axes.plot(*zip(*values, strict=True), label=name, linewidth=1.2, marker="." if len(values) < 3 else None)
    unit = "%" if asked[0].unit == _PERCENT else asked[0].unit
    axes.set_title(f"{title} [{unit}]" if unit != "short" else title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.set_ylim(bottom=0)
        # The largest lines are named; those that lie on zero would only hide them.
        lines = sorted(axes.get_lines(), key=_largest, reverse=True)[:_NAMED]
        legend = axes.legend(handles=lines, fontsize=6, ncols=2, loc="upper left", framealpha=0.6)
        legend.set_in_layout(False)


def draw(board: str, run: Observed, path: Path) -> None:
    """Draw a dashboard, panels on GPUs left out where the machine has none.

    Args:
        board: File of the dashboard, without its suffix.
        run: What to ask.
        path: PNG to write.
    """
    end = time.time()
    mine = [query for query in queries() if query.board == board and query.row != "GPUs"]
    panels = [(key, list(group)) for key, group in groupby(mine, key=lambda query: (query.row, query.panel))]
    rows = -(-len(panels) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(_COLUMNS * _PANEL[0], rows * _PANEL[1]), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, ((row, title), asked) in zip(grid.flat, panels, strict=False):
        _draw(axes, f"{row}: {title}", asked, run, end)
    figure.supxlabel("seconds since Prometheus began to ask", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Run a pipeline and draw both dashboards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as folder, observed(Path(folder)) as run:
        # The last scrapes, and the rules that are worked out from them.
        time.sleep(_SETTLE_SECONDS)
        for board in ("operators", "pipeline"):
            draw(board, run, out / f"{board}.png")
            print(out / f"{board}.png")


if __name__ == "__main__":
    main()
