"""Checks messages against the rules that the contract declares for them (protovalidate)."""

import protovalidate
from google.protobuf.message import Message

from services.common.rpc.status import RequestInvalidError

_PACKAGE = "granq."


def validate(message: object) -> None:
    """Raise RequestInvalidError when a message of this project's contract breaks its rules; others pass."""
    if not isinstance(message, Message) or not message.DESCRIPTOR.full_name.startswith(_PACKAGE):
        return
    violations = protovalidate.collect_violations(message)
    if violations:
        raise RequestInvalidError([(_path(v.proto.field), v.proto.message) for v in violations])


def _path(path: protovalidate.FieldPathPb | None) -> str:
    parts: list[str] = []
    for element in path.elements if path is not None else ():
        parts.append(f".{element.field_name}" if parts else element.field_name)
        if element.subscript is not None:
            key = element.subscript.value
            parts.append(f'["{key}"]' if isinstance(key, str) else f"[{key}]")
    return "".join(parts)
