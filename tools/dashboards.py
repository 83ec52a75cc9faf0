"""Writes the Grafana dashboards of deploy/grafana/dashboards: python -m tools.dashboards."""

import sys
from collections.abc import Iterable
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DashboardLinkType, DataSourceRef

from tools.dashboard_panels import OPERATORS, PIPELINE, Panel, Row

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards"
_HEIGHT, _WIDTHS = 8, {"stat": 4, "graph": 8}
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def _build_panel(panel: Panel) -> timeseries.Panel | stat.Panel:
    built: timeseries.Panel | stat.Panel
    if panel.kind == "stat":
        built = stat.Panel()
    else:
        legend = VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
        built = timeseries.Panel().min(0).legend(legend.display_mode(LegendDisplayMode.LIST))
    built = built.title(panel.title).unit(panel.unit).datasource(_SOURCE).height(_HEIGHT).span(_WIDTHS[panel.kind])
    if panel.about:
        built = built.description(panel.about)
    for index, (expression, legend_format) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend_format).ref_id(chr(ord("A") + index))
        built = built.with_target(query.exemplar(panel.kind == "graph"))
    return built


def build(title: str, uid: str, about: str, rows: Iterable[Row], other: tuple[str, str]) -> str:
    """Return a dashboard as JSON.

    Args:
        title: Its heading.
        uid: Its stable id, by which links find it.
        about: What it is for.
        rows: Its panels.
        other: Title and uid of the dashboard that it links to.
    """
    made = dashboard.Dashboard(title).uid(uid).description(about).tags(["granq"]).editable().refresh("30s")
    made = made.time("now-6h", "now").timezone("browser")
    made = made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    link = dashboard.DashboardLink(other[0]).type(DashboardLinkType.LINK).url(f"/d/{other[1]}").keep_time(True)
    made = made.links([link])
    for row in rows:
        made = made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(_build_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def documents() -> dict[str, str]:
    """Return all dashboards by file name."""
    operators, pipeline = ("GranQ operators", "granq-operators"), ("GranQ pipeline", "granq-pipeline")
    about = "Are the services well, and does work get done? Alerts are in deploy/prometheus/rules."
    of_one = (
        "How one pipeline goes: choose the time of its run. Metrics know no pipeline's id; the logs (field "
        "pipeline_id) and the exemplars do."
    )
    return {
        "operators.json": build(*operators, about, OPERATORS, pipeline),
        "pipeline.json": build(*pipeline, of_one, PIPELINE, operators),
    }


def main() -> None:
    """Write the files."""
    for name, text in documents().items():
        (FOLDER / name).write_text(text, "utf-8")
        print(FOLDER / name, file=sys.stderr)


if __name__ == "__main__":
    main()
