"""The dashboards are what tools/dashboards.py writes, fit the library's schema, and ask for metrics that there are."""

import json
import re
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.support.dashboards import FILES, Query, load, queries
from tests.support.deployment import DEPLOY
from tests.support.prometheus import metric_names, promtool, rules
from tools.dashboards import documents
from tools.metrics_catalogue import entries

OF_THE_CLIENT = {
    "up",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_max_fds",
}


def test_the_files_are_up_to_date() -> None:
    assert {path.name: path.read_text("utf-8") for path in FILES} == documents(), "run python -m tools.dashboards"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_schema_of_the_library_holds_all_of_it(path: Path) -> None:
    document = json.loads(path.read_text("utf-8"))
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(document))) == document


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_do_not_cover_each_other(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load(path.stem)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells


def test_panels_have_names_of_their_own() -> None:
    titles = [(query.board, query.row, query.panel, query.expression) for query in queries()]
    assert len(titles) == len(set(titles)) > 50


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.board}: {query.panel}")
def test_queries_ask_for_metrics_that_there_are(query: Query) -> None:
    known = OF_THE_CLIENT | {rule.name for rule in rules() if not rule.alert}
    labels: set[str] = {"instance", "job"}
    for entry in entries():
        suffixes = ("_bucket", "_sum", "_count") if entry.kind == "histogram" else ("",)
        known |= {f"{entry.exposed}{suffix}" for suffix in suffixes}
        labels |= set(entry.labels)
    asked = metric_names(query.promql("5m"))
    assert asked
    assert asked - known == set()
    assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) - labels == set()


def test_promtool_parses_every_query(tmp_path: Path) -> None:
    made = [{"record": f"panel:query:{number}", "expr": query.promql("5m")} for number, query in enumerate(queries())]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    promtool("check", "rules", str(path))


def test_provisioning_names_what_there_is() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["exemplarTraceIdDestinations"][0]["name"] == "trace_id"
    (provider,) = yaml.safe_load((folder / "dashboards" / "granq.yml").read_text())["providers"]
    assert provider["options"]["path"].endswith("/granq")
    boards = {load(path.stem)["uid"]: load(path.stem) for path in FILES}
    for board in boards.values():
        assert all(link["url"].removeprefix("/d/") in boards for link in board["links"])
        assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource"]
