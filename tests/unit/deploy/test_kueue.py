"""Quantizers as Jobs that Kueue admits: what KEDA makes of the ScaledJob is a valid Job that the queues can take."""

import copy
import json
import re
from typing import Any

import kubernetes_validate
import pytest

from services.coordinator.metrics import PipelineCollector
from tests.support.deployment import render
from tests.support.manifest_policies import disruptions_are_bounded
from tests.support.manifests import Object, environment, of_kind, pods, selects
from tests.unit.deploy.test_manifests import KUBERNETES

OVERLAY = "overlays/kueue"
QUEUE = "kueue.x-k8s.io/queue-name"


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(OVERLAY)


@pytest.fixture(scope="module")
def scaled(objects: list[Object]) -> Object:
    (found,) = of_kind(objects, "ScaledJob").values()
    return found


def job_of(scaled: Object) -> Object:
    """Return the Job that KEDA makes: its spec is the target's, its labels are the ScaledJob's."""
    metadata = {"name": "granq-quantizer-x7k2p", "namespace": "granq", "labels": scaled["metadata"]["labels"]}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": scaled["spec"]["jobTargetRef"]}


def amount(quantity: str) -> float:
    """Return a quantity of the kinds that are used here as a number."""
    number, unit = re.fullmatch(r"(\d+)(m|Mi|Gi|)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("version", KUBERNETES)
def test_keda_s_job_is_valid(scaled: Object, version: str) -> None:
    job = job_of(scaled)
    kubernetes_validate.validate(job, version, strict=True)
    misspelled = copy.deepcopy(job)
    misspelled["spec"]["backofLimit"] = misspelled["spec"].pop("backoffLimit")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelled, version, strict=True)


def test_its_pods_are_those_of_the_deployment_and_end_by_themselves(scaled: Object) -> None:
    template = copy.deepcopy(of_kind(render("overlays/gpu"), "Deployment")["granq-quantizer"]["spec"]["template"])
    template["spec"]["restartPolicy"] = "OnFailure"
    (container,) = template["spec"]["containers"]
    container["env"] += [
        {"name": "GRANQ_EXIT_WHEN_IDLE_SECONDS", "value": "120"},
        {"name": "GRANQ_SINGLE_PIPELINE", "value": "true"},
    ]
    found = scaled["spec"]["jobTargetRef"]["template"]

    def without_digests(item: Any) -> str:
        return re.sub(r"(granq-settings|granq-worker-principals)-[a-z0-9]{10}", r"\1", json.dumps(item, sort_keys=True))

    assert without_digests(found) == without_digests(template)


def test_a_job_waits_in_a_queue_that_can_take_it(objects: list[Object], scaled: Object) -> None:
    job = job_of(scaled)
    assert job["spec"]["suspend"] is True, "it would run where Kueue is not there to admit it"
    local = of_kind(objects, "LocalQueue")[job["metadata"]["labels"][QUEUE]]
    cluster = render("kueue")
    queue = of_kind(cluster, "ClusterQueue")[local["spec"]["clusterQueue"]]
    assert selects(queue["spec"]["namespaceSelector"], {"kubernetes.io/metadata.name": local["metadata"]["namespace"]})
    (group,) = queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] in of_kind(cluster, "ResourceFlavor")
    quota = {entry["name"]: amount(entry["nominalQuota"]) for entry in flavor["resources"]}
    resources = job["spec"]["template"]["spec"]["containers"][0]["resources"]
    asked = resources["limits"] | resources["requests"]  # a limit without a request is the request
    assert set(quota) == set(group["coveredResources"]) == set(asked)
    assert {name: quota[name] / amount(quantity) for name, quantity in asked.items()} == dict.fromkeys(asked, 2)
    assert not any("namespace" in item["metadata"] for item in cluster)


def test_jobs_are_made_for_what_pipelines_want_of_the_quantizer(scaled: Object) -> None:
    (trigger,) = scaled["spec"]["triggers"]
    described = {family.name for family in object.__new__(PipelineCollector).describe()}
    assert set(re.findall(r"granq_\w+", trigger["metadata"]["query"])) == {"granq_pipeline_jobs_open"} <= described


def test_nothing_else_makes_ends_or_bounds_quantizers(objects: list[Object]) -> None:
    assert "granq-quantizer" not in of_kind(objects, "Deployment", "ScaledObject", "PodDisruptionBudget")
    assert "granq-quantizer" in of_kind(objects, "Service")
    everywhere = {"matchLabels": {"app.kubernetes.io/part-of": "granq"}}
    budget = {"kind": "PodDisruptionBudget", "metadata": {"name": "all"}, "spec": {"selector": everywhere}}
    assert "granq-quantizer: budgets ['all']" in list(disruptions_are_bounded([*objects, budget]))


def test_pipelines_wait_for_an_admission_for_a_day(objects: list[Object]) -> None:
    (coordinator,) = [pod for pod in pods(objects) if pod.name == "granq-coordinator"]
    assert environment(objects, coordinator, coordinator.server)["GRANQ_UNAVAILABLE_SECONDS"] == "86400"
