"""Documentation must not drift: links lead somewhere, and the settings' table names the settings there are."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    ]
)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
SERVICES = {
    "coordinator": "CoordinatorSettings",
    "generator": "GeneratorSettings",
    "quantizer": "QuantizerSettings",
    "evaluator": "EvaluatorSettings",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = [t for t in LINK.findall(page.read_text("utf-8")) if not t.startswith(("http://", "https://"))]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_operations_names_every_setting_and_whose_it_is() -> None:
    expected: dict[str, set[str]] = {}
    for service, name in SERVICES.items():
        for setting in getattr(import_module(f"services.{service}.settings"), name).model_fields:
            expected.setdefault(f"GRANQ_{setting.upper()}", set()).add(service)
    rows = re.findall(r"^\| `(GRANQ_\w+)` \| ([\w, ]+) \|", (ROOT / "docs" / "operations.md").read_text("utf-8"), re.M)
    documented = {name: set(SERVICES) if owners == "all" else set(owners.split(", ")) for name, owners in rows}
    assert documented == expected


def test_readme_names_every_exit_code() -> None:
    from granq.cli.exits import Exit

    codes = re.findall(r"^\| (\d+) \| ", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert [int(code) for code in codes] == list(Exit)
