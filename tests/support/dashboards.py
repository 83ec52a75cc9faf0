"""Reads the dashboards of deploy/grafana."""

import json
from dataclasses import dataclass
from typing import Any

from tests.support.deployment import DEPLOY

FOLDER = DEPLOY / "grafana" / "dashboards"
FILES = tuple(sorted(FOLDER.glob("*.json")))


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        board: File of the dashboard, without its suffix.
        row: Heading above the panel.
        panel: Title of the panel.
        expression: In PromQL, with Grafana's variables.
        legend: Template of each series' name.
        unit: Grafana's name of the unit.
    """

    board: str
    row: str
    panel: str
    expression: str
    legend: str
    unit: str

    def promql(self, window: str) -> str:
        """Return what Prometheus is asked, with a window in place of Grafana's."""
        return self.expression.replace("$__rate_interval", window)


def load(name: str) -> dict[str, Any]:
    """Return a dashboard's document."""
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return document


def queries() -> list[Query]:
    """Return the queries of all dashboards, in order."""
    found = []
    for path in FILES:
        row = ""
        for panel in load(path.stem)["panels"]:
            if panel["type"] == "row":
                row = panel["title"]
                continue
            unit = panel["fieldConfig"]["defaults"]["unit"]
            found += [
                Query(path.stem, row, panel["title"], target["expr"], target["legendFormat"], unit)
                for target in panel["targets"]
            ]
    return found
