"""What kustomize renders fits together, fits the code, and keeps to the restricted pod security standard.

No cluster is asked; the checks read the rendered objects.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.deployment import (
    PROJECT,
    SERVICES,
    TARGETS,
    arguments,
    render,
    settings_class,
    settings_variables,
)
from tests.support.manifests import of_kind

Objects = list[dict[str, Any]]
FOLDERS = ("base", "overlays/cpu", "overlays/gpu")


@pytest.fixture(scope="module", params=FOLDERS)
def objects(request: pytest.FixtureRequest) -> Objects:
    return render(request.param)


def workloads(objects: Objects) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield service name, pod template and container of every Deployment and StatefulSet."""
    for name, workload in of_kind(objects, "Deployment", "StatefulSet").items():
        template = workload["spec"]["template"]
        (container,) = template["spec"]["containers"]
        yield name.removeprefix("granq-"), template, container


def ports(container: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def configuration(objects: Objects) -> dict[str, str]:
    (config,) = of_kind(objects, "ConfigMap").values()
    return dict(config["data"])


def environment(service: str, container: dict[str, Any]) -> dict[str, str]:
    """Return the container's own variables as Kubernetes would fill them in for its first pod."""
    filled = {}
    for entry in container.get("env", []):
        match entry:
            case {"name": name, "value": value}:
                filled[name] = value
            case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
                filled[name] = f"granq-{service}-0"
            case {"name": name, "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}:
                filled[name] = container["resources"]["limits"]["cpu"]
            case _:
                pytest.fail(f"this test does not know how Kubernetes fills in {entry}")
    return filled


def test_the_four_services_are_there(objects: Objects) -> None:
    assert {name for name, _, _ in workloads(objects)} == set(SERVICES)
    assert set(of_kind(objects, "StatefulSet")) == {"granq-coordinator"}


def test_no_object_names_a_namespace(objects: Objects) -> None:
    assert not [item["metadata"]["name"] for item in objects if "namespace" in item["metadata"]]


def test_ports_are_named_and_are_the_service_s_defaults(objects: Objects) -> None:
    for service, _, container in workloads(objects):
        port = settings_class(service).model_fields["port"].default
        assert ports(container) == {"grpc": port, "metrics": port + 1000}


def test_probes_ask_the_grpc_health_service(objects: Objects) -> None:
    for _, _, container in workloads(objects):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"] == {"port": ports(container)["grpc"]}


def test_prometheus_finds_the_metrics_port(objects: Objects) -> None:
    for _, template, container in workloads(objects):
        annotations = template["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert annotations["prometheus.io/path"] == "/metrics"
        assert annotations["prometheus.io/port"] == str(ports(container)["metrics"])


def test_pods_keep_to_the_restricted_standard(objects: Objects) -> None:
    for service, template, container in workloads(objects):
        (user,) = arguments(TARGETS[service].chain(service), "USER")
        pod = template["spec"]["securityContext"]
        assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == user, "the image's files and /data belong to this user"
        assert pod["runAsUser"] > 0
        assert pod["runAsNonRoot"] is True
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template["spec"])
        assert not [volume for volume in template["spec"]["volumes"] if "hostPath" in volume]


def test_pods_have_no_token_and_no_service_variables(objects: Objects) -> None:
    accounts = of_kind(objects, "ServiceAccount")
    for _, template, _ in workloads(objects):
        assert template["spec"]["automountServiceAccountToken"] is False
        assert accounts[template["spec"]["serviceAccountName"]]["automountServiceAccountToken"] is False
        assert template["spec"]["enableServiceLinks"] is False


def test_requests_and_limits_are_set(objects: Objects) -> None:
    for _, _, container in workloads(objects):
        for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
            assert {"cpu", "memory"} <= set(amounts)


def test_images_carry_the_project_s_version(objects: Objects) -> None:
    for service, _, container in workloads(objects):
        assert container["image"] == f"granq-{service}:{PROJECT['version']}"


def test_what_is_written_lies_on_volumes(objects: Objects) -> None:
    claims = set(of_kind(objects, "PersistentVolumeClaim"))
    for service, template, container in workloads(objects):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts) == {"/tmp", "/data/artifacts"} | (
            {"/data/coordinator"} if service == "coordinator" else set()
        )
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert "emptyDir" in volumes[mounts["/tmp"]]
        assert volumes[mounts["/data/artifacts"]]["persistentVolumeClaim"]["claimName"] in claims
    (state,) = of_kind(objects, "StatefulSet")["granq-coordinator"]["spec"]["volumeClaimTemplates"]
    assert state["metadata"]["name"] == "state"
    assert configuration(objects)["GRANQ_ARTIFACT_URL"] == "file:///data/artifacts"


def test_services_lead_to_pods(objects: Objects) -> None:
    services = of_kind(objects, "Service")
    stateful = of_kind(objects, "StatefulSet")["granq-coordinator"]["spec"]["serviceName"]
    assert services[stateful]["spec"]["clusterIP"] == "None"
    for service, template, container in workloads(objects):
        spec = services[f"granq-{service}"]["spec"]
        assert spec["selector"].items() <= template["metadata"]["labels"].items()
        assert {port["name"]: port["port"] for port in spec["ports"]} == ports(container)
        assert all(port["targetPort"] == port["name"] for port in spec["ports"])
        assert ("clusterIP" in spec) == (service != "coordinator")


def test_a_selector_matches_one_workload_only(objects: Objects) -> None:
    for workload in of_kind(objects, "Deployment", "StatefulSet").values():
        selector = workload["spec"]["selector"]["matchLabels"].items()
        chosen = [
            name for name, template, _ in workloads(objects) if selector <= template["metadata"]["labels"].items()
        ]
        assert len(chosen) == 1


def test_addresses_of_workers_are_services(objects: Objects) -> None:
    services = of_kind(objects, "Service")
    settings = configuration(objects)
    for worker in ("generator", "quantizer", "evaluator"):
        host, port = settings[f"GRANQ_{worker.upper()}_ADDRESS"].split(":")
        assert int(port) in {entry["port"] for entry in services[host]["spec"]["ports"]}


def test_settings_are_known_and_valid(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = configuration(objects)
    assert set(shared) <= set().union(*(settings_variables(service) for service in SERVICES))
    (name,) = of_kind(objects, "ConfigMap")
    for service, _, container in workloads(objects):
        assert container["envFrom"] == [{"configMapRef": {"name": name}}]
        own = {key: value for key, value in environment(service, container).items() if key.startswith("GRANQ_")}
        assert set(own) <= settings_variables(service)
        with monkeypatch.context() as patch:
            for key, value in {**shared, **own}.items():
                patch.setenv(key, value)
            settings = settings_class(service)().model_dump()
        assert settings["host"] == "0.0.0.0"
        assert settings["log_format"] == "json"
        assert settings.get("onnx_threads") in {None, int(float(container["resources"]["limits"]["cpu"]))}


def test_workflows_are_kept_on_the_coordinator_s_own_volume(objects: Objects) -> None:
    (container,) = of_kind(objects, "StatefulSet")["granq-coordinator"]["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert values["GRANQ_DATABASE_URL"].startswith(f"sqlite:///{mounts['state']}/")


def test_the_coordinator_s_executor_id_is_its_pod_s_name(objects: Objects) -> None:
    (container,) = of_kind(objects, "StatefulSet")["granq-coordinator"]["spec"]["template"]["spec"]["containers"]
    entries = {entry["name"]: entry for entry in container["env"]}
    assert entries["GRANQ_EXECUTOR_ID"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_servers_end_before_they_are_killed(objects: Objects) -> None:
    grace = float(configuration(objects)["GRANQ_GRACE_SECONDS"])
    for _, template, _ in workloads(objects):
        assert template["spec"]["terminationGracePeriodSeconds"] > grace


def test_only_the_gpu_overlay_asks_for_gpus_and_for_trainers_alone() -> None:
    for folder in FOLDERS:
        asking = {name for name, _, c in workloads(render(folder)) if "nvidia.com/gpu" in c["resources"]["limits"]}
        assert asking == ({"generator", "quantizer"} if folder == "overlays/gpu" else set())
