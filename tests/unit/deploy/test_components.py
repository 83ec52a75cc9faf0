"""Each component of deploy/kubernetes is rendered by some test, and those that no overlay has do what they say."""

from pathlib import Path

import pytest
import yaml

from tests.support.deployment import DEPLOY, overlay_on, render
from tests.support.manifests import Object, environment, of_kind, pods
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


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return render(overlay_on(tmp_path_factory.mktemp("overlay"), "overlays/gpu", "oidc", "tracing"))


def test_the_coordinator_alone_is_told_of_a_provider_of_tokens(objects: list[Object]) -> None:
    told = {pod.name for pod in pods(objects) if "GRANQ_OIDC_ISSUER" in environment(objects, pod, pod.server)}
    assert told == {"granq-coordinator"}


def test_traces_reach_the_collector_that_all_are_told_of(objects: list[Object]) -> None:
    told = {environment(objects, pod, pod.server)["OTEL_EXPORTER_OTLP_ENDPOINT"] for pod in pods(objects)}
    assert told == {"http://otel-collector.monitoring:4317"}
    (rule,) = of_kind(objects, "NetworkPolicy")["granq-traces"]["spec"]["egress"]
    assert rule["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert rule["ports"] == [{"port": 4317}]
