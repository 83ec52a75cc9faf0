"""docs/metrics.md lists the metrics of the code, all of them and no other, under names as Prometheus wants them."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.metrics_catalogue import PAGE, ROOT, Entry, entries, page

DECLARES = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
ENTRIES = entries()
FORBIDDEN_LABELS = re.compile(r"(^|_)(id|ids|name|user|owner|digest|url|path)$")


def names_in_source() -> set[str]:
    """Return the first argument of whatever makes a metric anywhere in the services."""
    found = set()
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in DECLARES or function.endswith("MetricFamily"):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(first.value)
    return found


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text("utf-8")
    assert text == page(text), "run python tools/metrics_catalogue.py"


def test_every_metric_of_the_source_is_in_the_catalogue() -> None:
    names = names_in_source()
    assert len(names) > 30
    assert names - {entry.name for entry in ENTRIES} == set()


def test_every_metric_of_the_catalogue_is_in_the_source() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.M))
    assert documented == {entry.exposed for entry in ENTRIES}
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "services").rglob("*.py"))
    assert [entry.name for entry in ENTRIES if f'"{entry.name}"' not in sources] == []


def test_names_are_unique() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_each_metric_is_named_explained_and_bounded(entry: Entry) -> None:
    assert re.fullmatch(r"(granq|grpc_server)_[a-z0-9_]+", entry.name)
    assert not entry.name.endswith("_total")
    assert not re.search(r"milli|micro|minute|hour|kilo|mega|mebi|percent", entry.name)
    assert "second" not in entry.name or entry.name.endswith(("_seconds", "_per_second"))
    assert entry.meaning.endswith(".")
    assert [label for label in entry.labels if FORBIDDEN_LABELS.search(label)] == []


def test_promtool_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian has it in the package prometheus")
    lines = []
    for entry in ENTRIES:
        kind = entry.kind if entry.kind in ("counter", "gauge") else "untyped"
        labels = ",".join(f'{label}="x"' for label in entry.labels)
        lines += [f"# HELP {entry.exposed} {entry.meaning}", f"# TYPE {entry.exposed} {kind}"]
        lines.append(f"{entry.exposed}{{{labels}}} 1")
    text = "\n".join(lines) + "\n"
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
