"""Rendered Kubernetes objects as the policies look at them: pods, their settings, and who may reach whom."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ScaledJob")


@dataclass(frozen=True)
class Pod:
    """The pods of one workload.

    Attributes:
        name: The workload's name.
        workload: The workload.
        spec: The pods' spec.
        labels: The pods' labels.
        annotations: The pods' annotations.
    """

    name: str
    workload: Object
    spec: Object
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def containers(self) -> list[Object]:
        """All containers, those that run before the others too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def server(self) -> Object:
        """The container of the service."""
        (found,) = [container for container in self.spec["containers"] if container["name"] == "server"]
        return dict(found)


def of_kind(objects: list[Object], *kinds: str) -> dict[str, Object]:
    """Return the objects of the given kinds by name."""
    return {item["metadata"]["name"]: item for item in objects if item["kind"] in kinds}


def pods(objects: list[Object]) -> Iterator[Pod]:
    """Yield the pods of every workload."""
    for name, workload in of_kind(objects, *WORKLOADS).items():
        template = workload["spec"].get("jobTargetRef", workload["spec"])["template"]
        metadata = template["metadata"]
        yield Pod(name, workload, template["spec"], metadata.get("labels", {}), metadata.get("annotations", {}))


def image_name(container: Object) -> str:
    """Return a container's image without registry and tag."""
    return str(container["image"]).rpartition("/")[2].partition(":")[0].partition("@")[0]


def environment(objects: list[Object], pod: Pod, container: Object) -> dict[str, str]:
    """Return a container's variables as Kubernetes fills them in; those from Secrets are left out.

    Raises:
        ValueError: A variable comes from a place that is not known here.
    """
    maps = of_kind(objects, "ConfigMap")
    filled: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            filled.update(maps.get(source["configMapRef"]["name"], {}).get("data", {}))
    for entry in container.get("env", []):
        match entry:
            case {"name": name, "value": value}:
                filled[name] = re.sub(r"\$\((\w+)\)", lambda match: filled.get(match[1], match[0]), value)
            case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
                filled[name] = f"{pod.name}-0"
            case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}:
                filled[name] = "some-node"
            case {"name": name, "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}:
                filled[name] = container["resources"]["limits"]["cpu"]
            case {"name": name, "valueFrom": {"secretKeyRef": _}}:
                filled.pop(name, None)
            case _:
                raise ValueError(f"{pod.name}: how Kubernetes fills in {entry} is not known here")
    return filled


def secret_variables(container: Object) -> set[str]:
    """Return the names of the variables that come from a Secret's key."""
    return {entry["name"] for entry in container.get("env", []) if "secretKeyRef" in entry.get("valueFrom", {})}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector fits.

    Raises:
        ValueError: It has an operator that is not known here.
    """
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise ValueError(f"operator {expression['operator']} is not known here")
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def _admits(peers: list[Object] | None, other: Pod) -> bool:
    """Whether a rule's peers include a pod of the same namespace; no peers are all peers."""
    if not peers:
        return True
    return any(
        "podSelector" in peer
        and selects(peer["podSelector"], other.labels)
        and selects(peer.get("namespaceSelector", {}), {"kubernetes.io/metadata.name": "granq"})
        for peer in peers
    )


def _allows(objects: list[Object], direction: str, pod: Pod, other: Pod, port: str) -> bool:
    """Whether the policies of a pod let it talk to another one in one direction; without a policy, everything."""
    key = {"Ingress": "from", "Egress": "to"}[direction]
    policies = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy").values()
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
    return not policies or any(
        _admits(rule.get(key), other)
        and ("ports" not in rule or port in {entry.get("port") for entry in rule["ports"]})
        for rule in rules
    )


def reaches(objects: list[Object], source: Pod, target: Pod, port: str) -> bool:
    """Whether the network policies of both let a pod connect to a named port of another."""
    return _allows(objects, "Egress", source, target, port) and _allows(objects, "Ingress", target, source, port)
