"""The error that the client raises, and how it is read from a gRPC status."""

from collections.abc import Iterable, Iterator

import grpc

DETAILS_KEY = "grpc-status-details-bin"


class GranqClientError(Exception):
    """A call that a server refused or that did not reach one.

    Attributes:
        code: gRPC status code, such as ``grpc.StatusCode.NOT_FOUND``.
        reason: Stable UPPER_SNAKE_CASE identifier for programs, such as ``"MODEL_NO_BATCH_NORM"``; "" when none came.
        field: Request field at fault, such as ``"spec.model.architecture"``; "" when none was.
        message: Sentence for people.
    """

    def __init__(self, code: grpc.StatusCode, message: str, *, reason: str = "", field: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.reason = reason
        self.field = field

    def __str__(self) -> str:
        """Return the message with the field in front, and the reason or the code behind."""
        place = f"{self.field}: " if self.field else ""
        return f"{place}{self.message} [{self.reason or self.code.name}]"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from ``args`` by default, which would lose reason and field between processes.
        return (_rebuild, (self.code, self.message, self.reason, self.field))


def _rebuild(code: grpc.StatusCode, message: str, reason: str, field: str) -> GranqClientError:
    return GranqClientError(code, message, reason=reason, field=field)


def from_rpc_error(error: grpc.RpcError) -> GranqClientError:
    """Translate gRPC's error, google.rpc details included.

    The details (google.rpc.Status with ErrorInfo and BadRequest) are read from their wire format here: that is a page
    of code, while the package with their classes would be one more dependency of every client.
    """
    code, message = grpc.StatusCode.UNKNOWN, str(error)
    trailers: Iterable[tuple[str, str | bytes]] = ()
    if isinstance(error, grpc.Call):
        code, message, trailers = error.code(), error.details() or "", error.trailing_metadata() or ()
    reason = field = ""
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                reason, field = read_details(value)
            except (IndexError, UnicodeDecodeError, ValueError):
                # Details that cannot be read must not hide the status that came with them.
                reason = field = ""
    return GranqClientError(code, message or code.name, reason=reason, field=field)


def read_details(status: bytes) -> tuple[str, str]:
    """Return (reason, first field at fault) from a serialized google.rpc.Status; "" where absent.

    Raises:
        ValueError: The bytes are no protobuf message.
        IndexError: They end early.
    """
    reason = field = ""
    for number, detail in _fields(status):
        if number != 3:  # Status.details
            continue
        parts = dict(_fields(detail))  # Any: 1 type_url, 2 value
        kind, content = parts.get(1, b"").rsplit(b"/", 1)[-1], parts.get(2, b"")
        if kind == b"google.rpc.ErrorInfo":
            reason = reason or dict(_fields(content)).get(1, b"").decode()
            # Where the request is well-formed, the field is metadata: entries of a map, 1 key, 2 value.
            metadata = dict(entry for number, value in _fields(content) if number == 3 for entry in [_entry(value)])
            field = field or metadata.get(b"field", b"").decode()
        elif kind == b"google.rpc.BadRequest":
            violations = [value for number, value in _fields(content) if number == 1]
            if violations and not field:
                field = dict(_fields(violations[0])).get(1, b"").decode()
    return reason, field


def _entry(message: bytes) -> tuple[bytes, bytes]:
    parts = dict(_fields(message))
    return parts.get(1, b""), parts.get(2, b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (field number, content) of the length-delimited fields; numbers are skipped."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, position = _varint(message, position)
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        elif wire_type == 2:
            length, position = _varint(message, position)
            if position + length > len(message):
                raise ValueError("the message ends inside a field")
            yield number, message[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {wire_type} is not in use")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
