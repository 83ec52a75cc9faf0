"""From a YAML text to a target."""

from pathlib import Path

import yaml

from granq.engines.target import fault_of
from granq.messages import MessageReader, compose, not_yaml
from granq.targets import Target
from granq.v1 import common_pb2

_FIELDS = ("title", "engine", "notes")


def read_target(text: str, origin: str) -> Target:
    """Return the target that ``text`` holds; as :func:`granq.targets.parse`."""
    reader, root = compose(text, origin, "target")
    parts = _parts(reader, root)
    for name in ("title", "engine"):
        if name not in parts:
            raise ValueError(f"{origin}: {name}: is missing")
    engine = common_pb2.EngineTarget()
    try:
        reader.fill(engine, parts["engine"], "engine")
    except (yaml.YAMLError, RecursionError) as error:  # of a value: they are read when their field's turn comes
        raise not_yaml(origin, error) from error
    if engine.runtime == common_pb2.RUNTIME_UNSPECIFIED:
        raise reader.error(parts["engine"], "engine.runtime", "is missing")
    if (fault := fault_of(engine)) is not None:
        raise reader.error(parts["engine"], f"engine.{fault[0]}", fault[1])
    engine.name = engine.name or Path(origin).stem
    title = _text(reader, parts["title"], "title")
    return Target(engine.name, title, engine, _notes(reader, parts.get("notes")))


def _parts(reader: MessageReader, root: yaml.Node) -> dict[str, yaml.Node]:
    if not isinstance(root, yaml.MappingNode):
        raise reader.error(root, "the target", "must be a mapping of fields")
    parts: dict[str, yaml.Node] = {}
    for key, value in root.value:
        name = str(key.value)
        if name not in _FIELDS:
            raise reader.error(key, name, f"no such field; a target has {', '.join(_FIELDS)}")
        if name in parts:
            raise reader.error(key, name, "given twice")
        parts[name] = value
    return parts


def _notes(reader: MessageReader, node: yaml.Node | None) -> tuple[str, ...]:
    if node is None:
        return ()
    if not isinstance(node, yaml.SequenceNode):
        raise reader.error(node, "notes", "must be a list")
    return tuple(_text(reader, item, f"notes[{index}]") for index, item in enumerate(node.value))


def _text(reader: MessageReader, node: yaml.Node, place: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str" or not node.value.strip():
        raise reader.error(node, place, "must be a text")
    return str(node.value).strip()
