"""Writes docs/metrics.md from the metrics that the code declares: python tools/metrics_catalogue.py [--check]."""

import argparse
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "metrics.md"
BEGIN, END = "<!-- begin: tools/metrics_catalogue.py -->", "<!-- end -->"
UNITS = ("seconds", "bytes", "ratio", "celsius", "watts")
# Modules of services.common whose metrics not every service has something to tell of.
WORKERS = ("jobs", "training", "children", "gpu")


@dataclass(frozen=True)
class Entry:
    """One metric of the catalogue."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    module: str

    @property
    def exposed(self) -> str:
        """Name as Prometheus has it; of a histogram, without _bucket, _sum and _count."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    @property
    def unit(self) -> str:
        """Base unit that the name tells."""
        return next((unit for unit in UNITS if self.name.endswith(f"_{unit}")), "1")

    @property
    def served_by(self) -> str:
        """Services that have it."""
        package, _, module = self.module.removeprefix("services.").partition(".")
        if package != "common":
            return package
        return "workers" if module.removeprefix("metrics.") in WORKERS else "all"


def modules() -> list[ModuleType]:
    """Import and return the modules that declare metrics: those in which prometheus_client is imported."""
    found = []
    import services

    for info in pkgutil.walk_packages(services.__path__, "services."):
        source = ROOT / (info.name.replace(".", "/") + ("/__init__.py" if info.ispkg else ".py"))
        if source.exists() and "prometheus_client" in source.read_text("utf-8"):  # compiled modules declare none
            found.append(importlib.import_module(info.name))
    return found


def declared(module: ModuleType) -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Yield the metrics of a module, and their labels."""
    for value in vars(module).values():
        if isinstance(value, MetricWrapperBase):
            (family,) = value.describe()
            yield family, tuple(value._labelnames)
        elif inspect.isclass(value) and Collector in value.__mro__[1:] and value.__module__ == module.__name__:
            # What a collector describes depends on nothing that it is made with.
            for family in object.__new__(value).describe():  # type: ignore[attr-defined]
                yield family, tuple(getattr(family, "_labelnames", ()))


@cache
def entries() -> list[Entry]:
    """Return all metrics of the code, sorted by name."""
    found = {
        Entry(family.name, family.type, labels, family.documentation, module.__name__)
        for module in modules()
        for family, labels in declared(module)
        # Where it is made, and not where it is imported.
        if f'"{family.name}"' in inspect.getsource(module)
    }
    return sorted(found, key=lambda entry: entry.name)


def table() -> str:
    """Return the catalogue as a table."""
    rows = ["| name | type | unit | labels | served by | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for entry in entries():
        labels = ", ".join(f"`{label}`" for label in entry.labels) or "–"
        cells = (f"`{entry.exposed}`", entry.kind, entry.unit, labels, entry.served_by, entry.meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """Return the page with its table as the code has it now."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write the page, or say that it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when the page is out of date")
    check = parser.parse_args().check
    before = PAGE.read_text("utf-8")
    after = page(before)
    if check and before != after:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date: run python tools/metrics_catalogue.py")
    PAGE.write_text(after, "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
