"""From a YAML text to a message of the contract, with errors that name file, line and field. Needs PyYAML."""

from typing import Any

import yaml
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message


def compose(text: str, origin: str, kind: str) -> tuple["MessageReader", yaml.Node]:
    """Return a reader of a YAML text and the text's root.

    Args:
        text: The document.
        origin: Its name, for errors.
        kind: What it is, such as "recipe".

    Raises:
        ValueError: Not one YAML document, or an empty one.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        raise not_yaml(origin, error) from error
    if root is None:
        raise ValueError(f"{origin}: the {kind} is empty")
    return MessageReader(loader, origin), root


def not_yaml(origin: str, error: Exception) -> ValueError:
    """Return the error of a text that YAML does not take."""
    return ValueError(f"{origin}: not a YAML document: {' '.join(str(error).split())}")


class MessageReader:
    """Goes through a YAML document beside the message that it describes, so that errors can name the line.

    Args:
        loader: What composed the document.
        origin: Its name, for errors.
    """

    def __init__(self, loader: yaml.SafeLoader, origin: str) -> None:
        self._loader = loader
        self._origin = origin

    def fill(self, message: Message, node: yaml.Node, path: str) -> None:
        """Set the fields of ``message`` from a mapping; ``path`` leads to it.

        Raises:
            ValueError: An unknown or repeated field, or a value of a wrong kind.
        """
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, path, "must be a mapping of fields")
        fields = message.DESCRIPTOR.fields_by_name
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "(no text)"
            place = f"{path}.{name}" if path else name
            if place == "model":
                raise self.error(key, place, "a recipe has no model; it is named where the recipe is used")
            if name not in fields:
                known = ", ".join(field for field in fields if path or field != "model")
                raise self.error(key, place, f"no such field; {message.DESCRIPTOR.name} has {known}")
            if name in seen:
                raise self.error(key, place, "given twice")
            seen.add(name)
            self._set(message, fields[name], value, place)

    def _set(self, message: Message, field: Any, node: yaml.Node, place: str) -> None:
        if field.message_type is None:
            self._set_plain(message, field, node, place)
        elif field.is_repeated:
            if not isinstance(node, yaml.SequenceNode):
                raise self.error(node, place, "must be a list")
            for index, item in enumerate(node.value):
                self.fill(getattr(message, field.name).add(), item, f"{place}[{index}]")
        else:
            part: Message = getattr(message, field.name)
            part.SetInParent()
            self.fill(part, node, place)

    def _set_plain(self, message: Message, field: Any, node: yaml.Node, place: str) -> None:
        value: Any = self._loader.construct_object(node, deep=True)
        try:
            if value is None:
                raise ValueError("has no value")
            ParseDict({field.name: value}, message)
        except (ParseError, TypeError, ValueError) as error:
            text = str(error).removeprefix(f"Failed to parse {field.name} field: ").rstrip(".")
            # The parser saw this one field of the message, and names it less well.
            raise self.error(node, place, text.removesuffix(f" at {message.DESCRIPTOR.name}.{field.name}")) from error

    def error(self, node: yaml.Node, place: str, what: str) -> ValueError:
        """Return an error that names file, line and field."""
        line = node.start_mark.line + 1
        return ValueError(f"{self._origin}:{line}: {place or 'the recipe'}: {what}")
