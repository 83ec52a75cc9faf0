"""Readers for what deploy/ declares and for what the code says of the same things."""

import fnmatch
import importlib
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic_settings import BaseSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SERVICES = ("coordinator", "evaluator", "generator", "quantizer")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: its name in capitals, its arguments with continued lines joined."""

    name: str
    arguments: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile in order, without comments."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [Instruction(name.upper(), rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Split at every FROM; what stands before the first (build arguments) is dropped."""
    starts = [i for i, instruction in enumerate(instructions) if instruction.name == "FROM"]
    return [instructions[start:end] for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True)]


def sent_to_builder(path: str) -> bool:
    """Whether .dockerignore lets ``path`` (relative to the root) into the context: the last rule that fits wins."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        prefixes = ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 2)]
        candidates = path.split("/") if "**/" in rule else prefixes
        if any(fnmatch.fnmatchcase(candidate, pattern) for candidate in candidates):
            sent = rule.startswith("!")
    return sent


def distributions(extras: list[str]) -> set[str]:
    """Return the canonical names that the project requires with ``extras``, through extras that name other extras.

    Raises:
        KeyError: If pyproject.toml has no such extra.
    """
    found: set[str] = set()
    pending = [*PROJECT["dependencies"], *(f"{PROJECT['name']}[{extra}]" for extra in extras)]
    while pending:
        requirement = Requirement(pending.pop())
        if canonicalize_name(requirement.name) != canonicalize_name(PROJECT["name"]):
            found.add(canonicalize_name(requirement.name))
            continue
        for extra in requirement.extras:
            pending += PROJECT["optional-dependencies"][extra]
    return found


def settings_class(service: str) -> type[BaseSettings]:
    """Return the settings class that services/<service>/settings.py declares."""
    module = importlib.import_module(f"services.{service}.settings")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BaseSettings) and value.__module__ == module.__name__
    )
    return found


def settings_variables(service: str) -> set[str]:
    """Return the names of the environment variables that a service reads."""
    declared = settings_class(service)
    return {f"{declared.model_config['env_prefix']}{field}".upper() for field in declared.model_fields}


def render(folder: str) -> list[dict[str, Any]]:
    """Return what ``kubectl kustomize`` renders for a folder of deploy/kubernetes; skips without kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(DEPLOY / "kubernetes" / folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr.lower(), result.stderr
    return list(yaml.safe_load_all(result.stdout))


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> dict[str, dict[str, Any]]:
    """Return the objects of the given kinds by name."""
    return {item["metadata"]["name"]: item for item in objects if item["kind"] in kinds}


def workloads(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield service name, pod template and container of every Deployment and StatefulSet."""
    for name, workload in of_kind(objects, "Deployment", "StatefulSet").items():
        template = workload["spec"]["template"]
        (container,) = template["spec"]["containers"]
        yield name.removeprefix("granq-"), template, container
