"""What kustomize renders is valid Kubernetes, keeps to the policies, and fits together and the code.

No cluster is asked; the checks read the rendered objects.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest

from services.common.metrics.jobs import JOBS_QUEUED, JOBS_RUNNING
from services.generator.servicer import KINDS as GENERATOR_KINDS
from services.quantizer.servicer import KINDS as QUANTIZER_KINDS
from tests.support.deployment import (
    JETSON,
    PROJECT,
    SERVICES,
    arguments,
    overlay_on,
    render,
    service_of,
    settings_class,
)
from tests.support.manifest_policies import POLICIES, Policy, no_host_paths
from tests.support.manifests import Object, environment, image_name, of_kind, pods, reaches

WHOLE = ("overlays/cpu", "overlays/gpu", "overlays/kueue")
OVERLAYS = (*WHOLE, "overlays/edge")
# What no overlay of these has, or not without others.
OPTIONAL = ("s3", "tracing", "oidc", "prometheus-operator", "kueue-jobs")
# The oldest that the manifests are meant for, and the newest whose schemas the validator has.
KUBERNETES = ("1.31", "1.37")
# Their schemas are those of the operators that bring them, which no package has.
CUSTOM = {
    ("cert-manager.io/v1", "Certificate"),
    ("cert-manager.io/v1", "Issuer"),
    ("keda.sh/v1alpha1", "ScaledJob"),
    ("keda.sh/v1alpha1", "ScaledObject"),
    ("kueue.x-k8s.io/v1beta1", "LocalQueue"),
    ("monitoring.coreos.com/v1", "PodMonitor"),
}
_validated: set[str] = set()


def schema_errors(item: Object, version: str) -> str:
    """Return what is wrong with an object in a version of Kubernetes, or "". Equal objects are looked at once."""
    key = hashlib.sha256(json.dumps([version, item], sort_keys=True).encode()).hexdigest()
    if (item["apiVersion"], item["kind"]) in CUSTOM or key in _validated:
        return ""
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return f"{item['kind']} {item['metadata']['name']}: {error}"
    _validated.add(key)
    return ""


@pytest.fixture(scope="module", params=[*OVERLAYS, OPTIONAL], ids=[*OVERLAYS, "optional"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    if request.param is OPTIONAL:
        return render(overlay_on(tmp_path_factory.mktemp("overlay"), "overlays/cpu", *OPTIONAL))
    return render(request.param)


@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_valid(objects: list[Object], version: str) -> None:
    assert [error for item in objects if (error := schema_errors(item, version))] == []


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_policies_hold(objects: list[Object], policy: Policy) -> None:
    assert list(policy(objects)) == []


def test_images_carry_the_project_s_version(objects: list[Object]) -> None:
    tags = {container["image"].rpartition(":")[2] for pod in pods(objects) for container in pod.containers}
    assert tags == {PROJECT["version"]}


def test_ports_are_the_services_defaults(objects: list[Object]) -> None:
    services = of_kind(objects, "Service")
    for pod in pods(objects):
        port = settings_class(service_of(image_name(pod.server))).model_fields["port"].default
        named = {entry["name"]: entry["containerPort"] for entry in pod.server.get("ports", [])}
        assert named == {"grpc": port, "metrics": port + 1000, "health": 52000}
        assert pod.annotations["prometheus.io/port"] == str(port + 1000)
        for service in services.values():
            if service["spec"]["selector"].items() <= pod.labels.items():
                assert {entry["port"] for entry in service["spec"]["ports"]} <= set(named.values())


def test_all_is_in_one_namespace_that_enforces_the_restricted_standard(objects: list[Object]) -> None:
    (namespace,) = of_kind(objects, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {item["metadata"].get("namespace") for item in objects if item is not namespace} == {"granq"}
    assert of_kind(objects, "ResourceQuota")


@pytest.mark.parametrize("overlay", WHOLE)
def test_a_whole_installation_has_the_four_services(overlay: str) -> None:
    objects = render(overlay)
    assert {service_of(image_name(pod.server)) for pod in pods(objects)} == set(SERVICES)
    assert "granq-coordinator" in of_kind(objects, "StatefulSet")


@pytest.mark.parametrize("overlay", WHOLE)
def test_addresses_are_services_that_may_be_reached(overlay: str) -> None:
    objects = render(overlay)
    services = of_kind(objects, "Service")
    by_service = {service_of(image_name(pod.server)): pod for pod in pods(objects)}
    for source in ("coordinator", "quantizer"):
        settings = environment(objects, by_service[source], by_service[source].server)
        for target in {"coordinator": ("generator", "quantizer", "evaluator"), "quantizer": ("generator",)}[source]:
            address = settings[f"GRANQ_{target.upper()}_ADDRESS"].removeprefix("dns:///")
            host, port = address.split(":")
            assert int(port) in {entry["port"] for entry in services[host]["spec"]["ports"]}
            assert services[host]["spec"]["clusterIP"] == "None"
            assert reaches(objects, by_service[source], by_service[target], "grpc"), f"{source} to {target}"


@pytest.mark.parametrize("overlay", WHOLE)
def test_nobody_else_is_reached(overlay: str) -> None:
    objects = render(overlay)
    wanted = {
        ("coordinator", "generator"),
        ("coordinator", "quantizer"),
        ("coordinator", "evaluator"),
        ("quantizer", "generator"),
    }
    if overlay != "overlays/cpu":
        wanted.add(("evaluator", "coordinator"))  # a device, which registers there
    everyone = list(pods(objects))
    pairs = {
        (service_of(image_name(a.server)), service_of(image_name(b.server)))
        for a in everyone
        for b in everyone
        if a is not b and reaches(objects, a, b, "grpc")
    }
    assert pairs == wanted
    assert not [
        (a.name, b.name) for a in everyone for b in everyone if a is not b and reaches(objects, a, b, "metrics")
    ]


def test_the_coordinator_s_executor_id_is_its_pod_s_name() -> None:
    for overlay in WHOLE:
        coordinator = of_kind(render(overlay), "StatefulSet")["granq-coordinator"]
        (container,) = coordinator["spec"]["template"]["spec"]["containers"]
        entries = {entry["name"]: entry for entry in container["env"]}
        assert entries["GRANQ_EXECUTOR_ID"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_workflows_are_kept_on_the_coordinator_s_own_volume_or_in_postgresql() -> None:
    small = of_kind(render("overlays/cpu"), "StatefulSet")["granq-coordinator"]
    (container,) = small["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert values["GRANQ_DATABASE_URL"].startswith(f"sqlite:///{mounts['state']}/")
    assert small["spec"]["replicas"] == 1
    large = of_kind(render("overlays/gpu"), "StatefulSet")["granq-coordinator"]
    (container,) = large["spec"]["template"]["spec"]["containers"]
    (url,) = [entry for entry in container["env"] if entry["name"] == "GRANQ_DATABASE_URL"]
    assert url["valueFrom"]["secretKeyRef"] == {"name": "granq-database", "key": "url"}
    assert "volumeClaimTemplates" not in large["spec"]


def test_only_trainers_and_tensorrt_s_evaluators_ask_for_gpus() -> None:
    asking = {
        overlay: {pod.name for pod in pods(render(overlay)) if "nvidia.com/gpu" in pod.server["resources"]["limits"]}
        for overlay in OVERLAYS
    }
    assert asking["overlays/cpu"] == set()
    assert {"granq-generator", "granq-quantizer"} <= asking["overlays/gpu"]
    for pod in pods(render("overlays/gpu")):
        if pod.name in asking["overlays/gpu"]:
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod.spec["tolerations"]


def test_a_device_at_the_edge_dials_out_and_lets_nobody_in() -> None:
    objects = render("overlays/edge")
    (device,) = pods(objects)
    settings = environment(objects, device, device.server)
    assert settings["GRANQ_DIAL_OUT"] == "true"
    assert settings["GRANQ_HOST"] == "127.0.0.1"
    assert settings["GRANQ_DEVICE_ID"] == "some-node"
    assert "GRANQ_ARTIFACT_URL" not in settings, "the device would look for artifacts there"
    assert device.spec["runtimeClassName"] == "nvidia"
    assert device.spec["nodeSelector"] == {"kubernetes.io/arch": "arm64"}
    assert "GRANQ_ARTIFACT_URL" not in " ".join(arguments(JETSON.chain("evaluator-jetson"), "ENV"))


def test_devices_in_the_cluster_are_dialled_by_names_of_their_service_and_certificate() -> None:
    objects = render("overlays/gpu")
    devices = [pod for pod in pods(objects) if pod.labels["app.kubernetes.io/name"] == "granq-evaluator-device"]
    assert {pod.name for pod in devices} == {"granq-rtx", "granq-tensorrt"}
    (name,) = [n for n in of_kind(objects, "Certificate")["granq-device"]["spec"]["dnsNames"] if n.startswith("*")]
    for pod in devices:
        host, port = environment(objects, pod, pod.server)["GRANQ_DEVICE_ADDRESS"].split(":")
        first, _, rest = host.partition(".")
        assert (first, rest, port) == (f"{pod.name}-0", name.removeprefix("*."), "50053")
        assert rest.partition(".")[0] in of_kind(objects, "Service")
        assert pod.workload["spec"]["serviceName"] == rest.partition(".")[0]


def test_autoscaling_asks_for_metrics_that_the_services_have() -> None:
    objects = render("overlays/gpu")
    known = {family.name for gauge in (JOBS_QUEUED, JOBS_RUNNING) for family in gauge.describe()}
    scaled = of_kind(objects, "ScaledObject")
    assert set(scaled) == {"granq-generator", "granq-quantizer"}
    for item in scaled.values():
        workload = of_kind(objects, "Deployment")[item["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in workload["spec"], "an apply would undo the scaling"
        for trigger in item["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            assert set(re.findall(r"granq_\w+", query)) == known
            kinds = {kind for group in re.findall(r'kind=~"([^"]+)"', query) for kind in group.split("|")}
            assert kinds
            assert kinds <= set(QUANTIZER_KINDS) | set(GENERATOR_KINDS)


def broken(change: Callable[[Object, Object], Any]) -> list[Object]:
    """Return the CPU overlay with a change of one workload and its container."""
    objects = copy.deepcopy(render("overlays/cpu"))
    workload = of_kind(objects, "Deployment")["granq-evaluator"]
    change(workload, workload["spec"]["template"]["spec"]["containers"][0])
    return objects


def pod_of(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


BREAKS: dict[str, Callable[[Object, Object], Any]] = {
    "images_are_pinned": lambda w, c: c.update(image="granq-evaluator:latest"),
    "images_are_built_here": lambda w, c: c.update(image="granq-evaluator-npu:0.1.0"),
    "requests_and_limits_are_set": lambda w, c: c["resources"]["limits"].pop("memory"),
    "pods_are_restricted": lambda w, c: c["securityContext"].update(
        capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}
    ),
    "roots_are_read_only": lambda w, c: c["securityContext"].update(readOnlyRootFilesystem=False),
    "no_host_paths": lambda w, c: pod_of(w)["volumes"].append({"name": "x", "hostPath": {"path": "/dev"}}),
    "ports_are_named": lambda w, c: c["ports"][0].pop("name"),
    "settings_are_real": lambda w, c: c["env"].append({"name": "GRANQ_ONNX_THREAD", "value": "4"}),
    "references_lead_somewhere": lambda w, c: c["envFrom"].append({"secretRef": {"name": "granq-misspelled"}}),
    "network_is_closed_by_default": lambda w, c: w["spec"]["template"]["metadata"]["labels"].pop(
        "app.kubernetes.io/part-of"
    ),
    "pods_know_no_cluster": lambda w, c: pod_of(w).pop("automountServiceAccountToken"),
    "servers_can_be_probed": lambda w, c: c["livenessProbe"].update(grpc={"port": 50053}),
    "servers_end_before_they_are_killed": lambda w, c: pod_of(w).update(terminationGracePeriodSeconds=5),
    "disruptions_are_bounded": lambda w, c: w["spec"]["template"]["metadata"]["labels"].update(
        {"app.kubernetes.io/name": "granq-other"}
    ),
    "selectors_choose_one_workload": lambda w, c: w["spec"]["selector"].update(
        matchLabels={"app.kubernetes.io/part-of": "granq"}
    ),
}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_each_policy_can_fail(policy: Policy) -> None:
    assert list(policy(broken(BREAKS[policy.__name__])))


def test_invalid_values_of_settings_are_found() -> None:
    objects = broken(lambda w, c: c["env"].append({"name": "GRANQ_BUILD_SECONDS", "value": "soon"}))
    (policy,) = [policy for policy in POLICIES if policy.__name__ == "settings_are_real"]
    assert any("build_seconds" in sentence for sentence in policy(objects))


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_validator_can_fail(version: str) -> None:
    objects = broken(lambda w, c: c.update(livenessprobe=c.pop("livenessProbe")))
    assert any("livenessprobe" in schema_errors(item, version) for item in objects)
    assert "granq" in schema_errors(
        {"apiVersion": "example.com/v1", "kind": "Toy", "metadata": {"name": "granq"}}, version
    )


def test_a_missing_policy_opens_what_the_matrix_would_show() -> None:
    objects = [item for item in render("overlays/cpu") if item["metadata"]["name"] != "granq-deny"]
    by_name = {pod.name: pod for pod in pods(objects)}
    kept = [
        i
        for i in objects
        if not (i["kind"] == "NetworkPolicy" and i["metadata"]["name"] in ("granq-generator", "granq-metrics"))
    ]
    assert not reaches(objects, by_name["granq-coordinator"], by_name["granq-generator"], "metrics")
    assert reaches(kept, by_name["granq-quantizer"], by_name["granq-generator"], "grpc")
    assert list(no_host_paths(objects)) == []
