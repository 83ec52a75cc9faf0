"""Readers for what deploy/ declares and for what the code says of the same things."""

import fnmatch
import functools
import importlib
import os
import re
import shutil
import subprocess
import tomllib
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


@dataclass(frozen=True)
class Stage:
    """One stage of a Dockerfile: what it builds on (a stage's name or an image), and its own instructions."""

    base: str
    instructions: tuple[Instruction, ...]


class Dockerfile:
    """A Dockerfile as its stages by name; stages without a name are not read.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
        parts = (line.partition(" ") for line in joined.splitlines())
        instructions = [Instruction(name.upper(), rest.strip()) for name, _, rest in parts]
        starts = [i for i, instruction in enumerate(instructions) if instruction.name == "FROM"]
        self.arguments = dict(i.arguments.split("=", 1) for i in instructions[: starts[0]] if i.name == "ARG")
        self.stages: dict[str, Stage] = {}
        for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
            base, _, name = re.split(r"\s+(AS)\s+", instructions[start].arguments, flags=re.IGNORECASE)
            self.stages[name] = Stage(base, tuple(instructions[start + 1 : end]))

    def chain(self, target: str) -> list[Instruction]:
        """Return the instructions that make a target, from those of the stages that it builds on to its own."""
        stage = self.stages[target]
        inherited = self.chain(stage.base) if stage.base in self.stages else []
        return [*inherited, *stage.instructions]

    def base_image(self, target: str) -> str:
        """Return the image that a target's chain begins with, with the default arguments filled in."""
        stage = self.stages[target]
        if stage.base in self.stages:
            return self.base_image(stage.base)
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], stage.base)

    def environment_of(self, target: str) -> str:
        """Return the stage whose Python environment a target copies."""
        (found,) = {
            match[1]
            for i in self.chain(target)
            if i.name == "COPY" and (match := re.match(r"--from=(\S+) /opt/granq ", i.arguments))
        }
        return found


SERVERS = Dockerfile(DEPLOY / "docker" / "Dockerfile")
JETSON = Dockerfile(DEPLOY / "docker" / "jetson.Dockerfile")
TARGETS = {
    **dict.fromkeys(
        ("coordinator", "evaluator", "evaluator-rtx", "evaluator-tensorrt", "generator", "quantizer"), SERVERS
    ),
    "evaluator-jetson": JETSON,
}
"""The Dockerfile of each image; granq-NAME is the image of the target NAME."""


def arguments(instructions: list[Instruction], name: str) -> list[str]:
    """Return the arguments of all instructions of one name."""
    return [instruction.arguments for instruction in instructions if instruction.name == name]


def service_of(target: str) -> str:
    """Return the service that an image runs, from its name."""
    return target.removeprefix("granq-").partition("-")[0]


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


@functools.cache
def kustomize(folder: str) -> str:
    """Return what ``kubectl kustomize`` renders for a folder of deploy/kubernetes; skips without kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(DEPLOY / "kubernetes" / folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr.lower(), result.stderr
    return result.stdout


def overlay_on(folder: Path, overlay: str, *components: str) -> str:
    """Write an operator's overlay into a folder, for `render`: one of deploy/kubernetes, and components on top."""
    there = Path(os.path.relpath(DEPLOY / "kubernetes", folder))
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(there / overlay)],
        "components": [str(there / "components" / component) for component in components],
        "namespace": "granq",
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return str(folder)


def render(folder: str) -> list[dict[str, Any]]:
    """Return the objects that kustomize renders for a folder (of deploy/kubernetes); each caller gets its own."""
    return list(yaml.load_all(kustomize(folder), yaml.CSafeLoader))
