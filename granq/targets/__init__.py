"""Targets: what an engine is built for, as YAML files.

A target has a ``title``, an ``engine`` with the fields of granq.v1.EngineTarget in protobuf's JSON form, and ``notes``
for people. Shipped are common devices; a file of one's own does as well. Reading needs PyYAML (extra "cli").
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from granq import documents
from granq.v1 import common_pb2


@dataclass(frozen=True)
class Target:
    """A device, or a family of devices that run the same engine.

    Attributes:
        name: Name, also in reports.
        title: What it is, in one line.
        engine: What a pipeline is asked for; its name is this one.
        notes: What to know before using it.
    """

    name: str
    title: str
    engine: common_pb2.EngineTarget = field(hash=False)
    notes: tuple[str, ...] = ()


def names() -> list[str]:
    """Return the shipped targets, such as "jetson-orin-nano"."""
    return documents.names(__name__)


def read(name: str) -> str:
    """Return the text of a target: a file if the name ends with .yaml or .yml, else one of :func:`names`.

    Raises:
        ValueError: No target of that name is shipped, or the file is not UTF-8.
        OSError: The file cannot be read.
    """
    return documents.read(__name__, "target", name, names())


def load(name: str) -> Target:
    """Return a shipped target or that of a file, as :func:`read` finds it.

    Raises:
        ValueError: There is no such target, or it is not valid; the message names file, line and field.
        OSError: The file cannot be read.
    """
    return parse(read(name), name)


def load_all(wanted: Iterable[str]) -> list[Target]:
    """Return several targets in their order; as :func:`load`.

    Raises:
        ValueError: Also when a target is named twice.
        OSError: A file cannot be read.
    """
    found: dict[str, Target] = {}
    for name in wanted:
        target = load(name)
        if target.name in found:
            raise ValueError(f"target {target.name!r} is named twice")
        found[target.name] = target
    return list(found.values())


def parse(text: str, origin: str) -> Target:
    """Return the target that a YAML text holds; ``origin`` names it in errors, and gives it its name.

    Raises:
        ValueError: Not YAML, an unknown or repeated field, a value of a wrong kind, or a missing one.
    """
    try:
        from granq.targets.reading import read_target
    except ModuleNotFoundError as error:
        raise ValueError(f"targets need {error.name}: pip install 'granq-pipeline[cli]'") from error
    return read_target(text, origin)
