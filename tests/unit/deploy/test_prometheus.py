"""Prometheus scrapes the metrics ports that the servers have by default, and its rules are sound and tested."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.support.deployment import ROOT, SERVICES, render, settings_class
from tests.support.prometheus import FOLDER, RULES, Rule, metric_names, promtool, rules
from tools.metrics_catalogue import entries

CONFIG = FOLDER / "prometheus.yml"
TESTS = FOLDER / "tests" / "alerts.test.yml"
ALERTS = [rule for rule in rules() if rule.alert]
OPERATIONS = ROOT / "docs" / "operations.md"


def test_every_service_is_a_target() -> None:
    (job,) = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    targets = {entry["labels"]["service"]: entry["targets"] for entry in job["static_configs"]}
    ports = {name: settings_class(name).model_fields["port"].default + 1000 for name in SERVICES}
    assert targets == {name: [f"localhost:{port}"] for name, port in ports.items()}


def test_promtool_accepts_the_configuration() -> None:
    assert f"{len(RULES)} rule files found" in promtool("check", "config", str(CONFIG))


def test_promtool_lints_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))


def test_the_rules_pass_their_tests() -> None:
    promtool("test", "rules", str(TESTS))


def test_every_alert_is_seen_to_fire_and_to_stay_silent() -> None:
    fired: set[str] = set()
    silent: set[str] = set()
    for group in yaml.safe_load(TESTS.read_text())["tests"]:
        names = [series["series"].partition("{")[0] for series in group["input_series"]]
        for case in group["alert_rule_test"]:
            alerts = case.get("exp_alerts", [])
            (fired if alerts else silent).add(case["alertname"])
            # Several series went in and only one set it off: that, too, is a case in which it must not fire.
            asked = metric_names(next(rule.expression for rule in ALERTS if rule.name == case["alertname"]))
            if sum(name in asked for name in names) > len(alerts) > 0:
                silent.add(case["alertname"])
    assert fired == {rule.name for rule in ALERTS}
    recorded = {rule.name for rule in ALERTS if any(":" in name for name in metric_names(rule.expression))}
    assert {rule.name for rule in ALERTS} - silent - recorded == set()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_rules_ask_for_metrics_that_there_are(rule: Rule) -> None:
    known = {other.name for other in rules() if not other.alert}
    for entry in entries():
        suffixes = ("_bucket", "_sum", "_count") if entry.kind == "histogram" else ("",)
        known |= {f"{entry.exposed}{suffix}" for suffix in suffixes}
    of_the_client = {"up", "process_start_time_seconds", "process_open_fds", "process_max_fds"}
    asked = metric_names(rule.expression)
    assert asked
    assert asked - known - of_the_client == set()


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.name)
def test_alerts_say_what_is_wrong_and_where_to_read_on(rule: Rule) -> None:
    assert rule.name.startswith("Granq")
    assert rule.labels["severity"] in ("warning", "critical")
    assert set(rule.annotations) == {"summary", "description", "runbook_url"}
    assert rule.annotations["runbook_url"] == f"docs/operations.md#{rule.name.lower()}"


def test_the_runbook_has_a_section_for_each_alert() -> None:
    headings = {heading.strip().lower() for heading in re.findall(r"^#+ (.+)$", OPERATIONS.read_text("utf-8"), re.M)}
    anchors = {rule.name.lower() for rule in ALERTS}
    if not headings & anchors:
        pytest.skip("docs/operations.md has no sections on alerts yet")
    assert anchors - headings == set()


def test_pods_get_the_labels_that_the_rules_know(tmp_path: Path) -> None:
    """Debian's Prometheus is built without Kubernetes, so its discovery is played: pods as targets, with its labels."""
    config = yaml.safe_load((FOLDER / "kubernetes.yml").read_text())
    config["rule_files"] = []
    (job,) = config["scrape_configs"]
    (discovery,) = job.pop("kubernetes_sd_configs")
    assert discovery["role"] == "pod"
    assert discovery["selectors"] == [{"role": "pod", "label": "app.kubernetes.io/part-of=granq"}]
    job["static_configs"] = []
    for workload in render("base"):
        if workload["kind"] not in ("Deployment", "StatefulSet"):
            continue
        template = workload["spec"]["template"]
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "granq"
        for port in (port for container in template["spec"]["containers"] for port in container["ports"]):
            meta = {
                "pod_name": f"{workload['metadata']['name']}-0",
                "pod_phase": "Running",
                "pod_container_port_name": port["name"],
                "pod_label_app_kubernetes_io_name": template["metadata"]["labels"]["app.kubernetes.io/name"],
                "namespace": "zsq",
                "pod_node_name": "node-1",
            }
            labels = {f"__meta_kubernetes_{key}": value for key, value in meta.items()}
            job["static_configs"].append({"targets": [f"10.0.0.1:{port['containerPort']}"], "labels": labels})
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    found = [target["labels"] for target in json.loads(promtool("check", "service-discovery", str(path), "granq"))]
    kept = {labels["service"]: labels for labels in found if labels}
    ports = {name: settings_class(name).model_fields["port"].default + 1000 for name in SERVICES}
    assert {name: labels["__address__"] for name, labels in kept.items()} == {
        name: f"10.0.0.1:{port}" for name, port in ports.items()
    }
    assert all(labels["instance"] == f"granq-{name}-0" for name, labels in kept.items())
    assert all(labels["job"] == "granq" and labels["namespace"] == "zsq" for labels in kept.values())
