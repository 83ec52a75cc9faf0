"""Each component of deploy/kubernetes is rendered by some test, and those that no overlay has do what they say."""

from pathlib import Path

import yaml

from tests.support.deployment import DEPLOY, overlay_on, render
from tests.support.manifests import environment, of_kind, pods
from tests.unit.deploy.test_manifests import OPTIONAL, OVERLAYS


def test_each_component_is_tried() -> None:
    within = {
        Path(name).name
        for folder in ("base", "devices", *OVERLAYS)
        for name in yaml.safe_load((DEPLOY / "kubernetes" / folder / "kustomization.yaml").read_text()).get(
            "components", []
        )
    }
    assert within | set(OPTIONAL) == {path.name for path in (DEPLOY / "kubernetes/components").iterdir()}


def test_the_coordinator_alone_is_told_of_a_provider_of_tokens(tmp_path: Path) -> None:
    objects = render(overlay_on(tmp_path, "overlays/gpu", "oidc"))
    told = {pod.name for pod in pods(objects) if "GRANQ_OIDC_ISSUER" in environment(objects, pod, pod.server)}
    assert told == {"granq-coordinator"}


def test_traces_reach_the_collector_that_all_are_told_of(tmp_path: Path) -> None:
    objects = render(overlay_on(tmp_path, "overlays/gpu", "tracing"))
    told = {environment(objects, pod, pod.server)["OTEL_EXPORTER_OTLP_ENDPOINT"] for pod in pods(objects)}
    assert told == {"http://otel-collector.monitoring:4317"}
    (rule,) = of_kind(objects, "NetworkPolicy")["granq-traces"]["spec"]["egress"]
    assert rule["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert rule["ports"] == [{"port": 4317}]
