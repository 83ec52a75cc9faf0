"""Debian's Prometheus and promtool, and what deploy/prometheus holds."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tests.support.deployment import DEPLOY

FOLDER = DEPLOY / "prometheus"
RULES = tuple(sorted((FOLDER / "rules").glob("*.yml")))
START_SECONDS = 30.0
_METRIC = re.compile(r"(?<![\w:\"])((?:granq|grpc_server|process)_\w+|up|[a-z]+:\w+:\w+)\b")


def program(name: str) -> str:
    """Return the path of a program of Debian's package prometheus; skips without."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: Debian has it in the package prometheus")
    return found


def promtool(*arguments: str, stdin: str = "") -> str:
    """Return what promtool says; fails when it finds fault."""
    command = [program("promtool"), *arguments]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass(frozen=True)
class Rule:
    """One rule of deploy/prometheus/rules."""

    name: str
    expression: str
    alert: bool
    labels: dict[str, str]
    annotations: dict[str, str]


def rules() -> list[Rule]:
    """Return all rules."""
    found = []
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                name = rule.get("alert") or rule["record"]
                labels, annotations = rule.get("labels", {}), rule.get("annotations", {})
                found.append(Rule(name, rule["expr"], "alert" in rule, labels, annotations))
    return found


def metric_names(expression: str) -> set[str]:
    """Return the metrics and recorded series that an expression asks for."""
    return set(_METRIC.findall(re.sub(r"\{[^}]*\}|\b(by|without|ignoring|on)\s*\([^)]*\)", " ", expression)))


class Prometheus:
    """A running Prometheus.

    Args:
        port: Where it answers.
    """

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its API."""
        with urlopen(f"{self._url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Any]:
        """Return the series that an expression gives now."""
        found: list[Any] = self.get("query", query=expression)["result"]
        return found

    def query_range(self, expression: str, begin: float, end: float, step: float) -> list[Any]:
        """Return the series that an expression gives between two times, in seconds since the epoch."""
        times = {"start": str(begin), "end": str(end), "step": str(step)}
        found: list[Any] = self.get("query_range", query=expression, **times)["result"]
        return found

    def ready(self) -> bool:
        """Return whether it answers queries."""
        try:
            with urlopen(f"{self._url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, targets: dict[str, str], interval: str) -> Iterator[Prometheus]:
    """Run Prometheus with the rules of deploy/prometheus.

    Args:
        folder: For its data, configuration and log.
        targets: host:port of the metrics of each service.
        interval: Between scrapes, and between evaluations of rules, such as "1s".
    """
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(path) for path in RULES]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [at], "labels": {"service": name}} for name, at in targets.items()]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    log = folder / "prometheus.log"
    # Prometheus binds port 0 to a free port, and tells in its log alone which one it is.
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
        "--enable-feature=exemplar-storage",
        "--log.format=json",
    ]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while (port := _bound_port(log)) is None or not Prometheus(port).ready():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield Prometheus(port)
        finally:
            process.terminate()
            process.wait(30)


def _bound_port(log: Path) -> int | None:
    found = re.search(r'"address":"127\.0\.0\.1:(\d+)"[^\n]*"msg":"Listening on"', log.read_text())
    return int(found[1]) if found else None
