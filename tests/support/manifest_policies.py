"""What every manifest of deploy/kubernetes must keep to. Each policy yields sentences that say where one does not."""

import os
from collections.abc import Callable, Iterator
from unittest.mock import patch

from pydantic import ValidationError

from tests.support.deployment import SERVICES, TARGETS, service_of, settings_class, settings_variables
from tests.support.manifests import Object, Pod, environment, image_name, of_kind, pods, secret_variables, selects

Policy = Callable[[list[Object]], Iterator[str]]
# Made by operators, who are told so where they are used; cert-manager makes those that a Certificate names.
OPERATORS_SECRETS = {"granq-database", "granq-principals", "granq-s3", "granq-service-token", "granq-ca-bundle"}


def images_are_pinned(objects: list[Object]) -> Iterator[str]:
    """No image is called latest, or nothing, which is the same."""
    for pod in pods(objects):
        for container in pod.containers:
            tag = str(container["image"]).rpartition("/")[2].partition(":")[2]
            if tag in ("", "latest") and "@sha256:" not in container["image"]:
                yield f"{pod.name}: {container['image']} has no version"


def images_are_built_here(objects: list[Object]) -> Iterator[str]:
    """Every image is a target of a Dockerfile."""
    for pod in pods(objects):
        for container in pod.containers:
            if image_name(container).removeprefix("granq-") not in TARGETS:
                yield f"{pod.name}: no Dockerfile has a target for {container['image']}"


def requests_and_limits_are_set(objects: list[Object]) -> Iterator[str]:
    """Every container has both, for both."""
    for pod in pods(objects):
        for container in pod.containers:
            resources = container.get("resources", {})
            for kind in ("requests", "limits"):
                if missing := {"cpu", "memory"} - set(resources.get(kind, {})):
                    yield f"{pod.name}: {kind} of {', '.join(sorted(missing))}"


def pods_are_restricted(objects: list[Object]) -> Iterator[str]:
    """The restricted pod security standard, and the user that the images' files belong to."""
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or (context.get("runAsUser"), context.get("runAsGroup")) != (
            10001,
            10001,
        ):
            yield f"{pod.name}: runs as {context.get('runAsUser')}, not as the images' user"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.name}: seccomp profile"
        if found := {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec):
            yield f"{pod.name}: {', '.join(sorted(found))}"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{pod.name}: may escalate its privileges"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{pod.name}: capabilities"
            if {"runAsUser", "runAsNonRoot"} & set(own):
                yield f"{pod.name}: a container has a user of its own"


def roots_are_read_only(objects: list[Object]) -> Iterator[str]:
    """The root file system cannot be written, and what the image writes to lies on volumes."""
    for pod in pods(objects):
        for container in pod.containers:
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{pod.name}: writes to its root"
            if "/tmp" not in {mount["mountPath"] for mount in container.get("volumeMounts", [])}:
                yield f"{pod.name}: has no /tmp"


def no_host_paths(objects: list[Object]) -> Iterator[str]:
    """No volume is a folder of the node."""
    for pod in pods(objects):
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.name}: {volume['hostPath']['path']} of the node"


def ports_are_named(objects: list[Object]) -> Iterator[str]:
    """Every port has a name, and Services lead to ports by theirs."""
    for pod in pods(objects):
        for container in pod.containers:
            for port in container.get("ports", []):
                if not port.get("name"):
                    yield f"{pod.name}: port {port['containerPort']}"
    known = {port.get("name") for pod in pods(objects) for c in pod.containers for port in c.get("ports", [])}
    for name, service in of_kind(objects, "Service").items():
        for port in service["spec"]["ports"]:
            if not port.get("name") or port.get("targetPort") not in known:
                yield f"{name}: port {port['port']} leads to {port.get('targetPort')}"


def settings_are_real(objects: list[Object]) -> Iterator[str]:
    """Every GRANQ_ variable is a setting of the service that gets it, shared ones of some service, and valid."""
    anybodys = set().union(*(settings_variables(service) for service in SERVICES))
    for name, config in of_kind(objects, "ConfigMap").items():
        for variable in config.get("data", {}):
            if variable.startswith("GRANQ_") and variable not in anybodys:
                yield f"{name}: no service has the setting {variable}"
    for pod in pods(objects):
        for container in pod.containers:
            yield from _settings_of(objects, pod, container)


def _settings_of(objects: list[Object], pod: Pod, container: Object) -> Iterator[str]:
    service = service_of(image_name(container))
    if service not in SERVICES:
        yield f"{pod.name}: no service is called {service}"
        return
    known = settings_variables(service)
    own = {entry["name"] for entry in container.get("env", [])} | secret_variables(container)
    for variable in sorted(name for name in own if name.startswith("GRANQ_") and name not in known):
        yield f"{pod.name}: the {service} has no setting {variable}"
    given = {name: value for name, value in environment(objects, pod, container).items() if name in known}
    try:
        with patch.dict(os.environ, given):
            settings_class(service)()
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            yield f"{pod.name}: {'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}"


def references_lead_somewhere(objects: list[Object]) -> Iterator[str]:
    """Every ConfigMap, Secret, claim and account that a pod names is there, or is told of."""
    there = {kind: set(of_kind(objects, kind)) for kind in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount")}
    issued = {certificate["spec"]["secretName"] for certificate in of_kind(objects, "Certificate").values()}
    there["Secret"] = OPERATORS_SECRETS | issued
    for pod in pods(objects):
        if pod.spec.get("serviceAccountName") not in there["ServiceAccount"]:
            yield f"{pod.name}: ServiceAccount {pod.spec.get('serviceAccountName')}"
        for kind, name in _references(pod):
            if name not in there[kind]:
                yield f"{pod.name}: {kind} {name}"
        mounted = {mount["name"] for c in pod.containers for mount in c.get("volumeMounts", [])}
        claimed = {claim["metadata"]["name"] for claim in pod.workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | claimed
        if mounted ^ volumes:
            yield f"{pod.name}: volumes {sorted(volumes)}, mounts {sorted(mounted)}"


def _references(pod: Pod) -> Iterator[tuple[str, str]]:
    for volume in pod.spec.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.containers:
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                yield "ConfigMap", source["configMapRef"]["name"]
            if "secretRef" in source:
                yield "Secret", source["secretRef"]["name"]
        for entry in container.get("env", []):
            if "secretKeyRef" in entry.get("valueFrom", {}):
                yield "Secret", entry["valueFrom"]["secretKeyRef"]["name"]


def network_is_closed_by_default(objects: list[Object]) -> Iterator[str]:
    """A policy that allows nothing selects every pod, in both directions."""
    denying = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy").values()
        if set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not policy["spec"].get("ingress")
        and not policy["spec"].get("egress")
    ]
    for pod in pods(objects):
        if not any(selects(spec["podSelector"], pod.labels) for spec in denying):
            yield f"{pod.name}: no policy denies by default"


def pods_know_no_cluster(objects: list[Object]) -> Iterator[str]:
    """No pod has a token of the cluster, or variables that Kubernetes makes of Services."""
    accounts = of_kind(objects, "ServiceAccount")
    for pod in pods(objects):
        account = accounts.get(pod.spec.get("serviceAccountName", ""), {})
        if pod.spec.get("automountServiceAccountToken") is not False or account.get("automountServiceAccountToken"):
            yield f"{pod.name}: has a token"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.name}: gets variables of Services"


def servers_can_be_probed(objects: list[Object]) -> Iterator[str]:
    """All three probes ask the health port, which the settings open."""
    for pod in pods(objects):
        opened = environment(objects, pod, pod.server).get("GRANQ_HEALTH_PORT")
        named = {port.get("name"): port["containerPort"] for port in pod.server.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = pod.server.get(probe, {}).get("grpc", {}).get("port")
            if asked is None or asked != named.get("health") or str(asked) != opened:
                yield f"{pod.name}: {probe} asks {asked}, the health port is {opened}"


def servers_end_before_they_are_killed(objects: list[Object]) -> Iterator[str]:
    """The kubelet waits longer than the server does."""
    for pod in pods(objects):
        grace = float(environment(objects, pod, pod.server).get("GRANQ_GRACE_SECONDS", "10"))
        if pod.spec.get("terminationGracePeriodSeconds", 30) <= grace:
            yield f"{pod.name}: is killed within the grace of {grace:.0f} s"


def disruptions_are_bounded(objects: list[Object]) -> Iterator[str]:
    """Exactly one budget covers every server, and none those of Jobs: it could not tell how many there should be."""
    budgets = of_kind(objects, "PodDisruptionBudget")
    for pod in pods(objects):
        covering = [name for name, b in budgets.items() if selects(b["spec"]["selector"], pod.labels)]
        if len(covering) != (pod.workload["kind"] != "ScaledJob"):
            yield f"{pod.name}: budgets {covering}"


def selectors_choose_one_workload(objects: list[Object]) -> Iterator[str]:
    """A workload's selector fits its own pods and no other's."""
    for pod in pods(objects):
        if pod.workload["kind"] == "ScaledJob":
            continue  # Kubernetes gives each Job a selector of its own
        chosen = [other.name for other in pods(objects) if selects(pod.workload["spec"]["selector"], other.labels)]
        if chosen != [pod.name]:
            yield f"{pod.name}: its selector chooses {chosen}"


POLICIES: tuple[Policy, ...] = (
    images_are_pinned,
    images_are_built_here,
    requests_and_limits_are_set,
    pods_are_restricted,
    roots_are_read_only,
    no_host_paths,
    ports_are_named,
    settings_are_real,
    references_lead_somewhere,
    network_is_closed_by_default,
    pods_know_no_cluster,
    servers_can_be_probed,
    servers_end_before_they_are_killed,
    disruptions_are_bounded,
    selectors_choose_one_workload,
)
