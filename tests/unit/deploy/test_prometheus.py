"""Prometheus scrapes the metrics ports that the servers have by default."""

import shutil
import subprocess

import pytest
import yaml

from tests.support.deployment import DEPLOY, SERVICES, settings_class

CONFIG = DEPLOY / "prometheus" / "prometheus.yml"


def test_every_service_is_a_target() -> None:
    (job,) = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    targets = {entry["labels"]["service"]: entry["targets"] for entry in job["static_configs"]}
    ports = {name: settings_class(name).model_fields["port"].default + 1000 for name in SERVICES}
    assert targets == {name: [f"localhost:{port}"] for name, port in ports.items()}


def test_promtool_accepts_the_configuration() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian has it in the package prometheus")
    command = [promtool, "check", "config", str(CONFIG)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
