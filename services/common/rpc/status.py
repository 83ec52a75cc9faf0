"""Errors of the domain to and from gRPC statuses with google.rpc details."""

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import (
    CLASSES,
    CODES,
    INTERNAL_MESSAGE,
    GranqError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    as_granq_error,
    code_of,
    without_paths,
)

DOMAIN = "granq"
DETAILS_KEY = "grpc-status-details-bin"

_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

STATUS_CODES: dict[type[GranqError], grpc.StatusCode] = {cls: _BY_NUMBER[number] for cls, number in CODES.items()}
"""Status of each class of errors."""


class RequestInvalidError(InvalidArgumentError):
    """A request breaks rules of the contract.

    Args:
        violations: Field path and what is wrong with it, for each broken rule; at least one.
    """

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        path, description = violations[0]
        super().__init__(f"{path}: {description}" if path else description, field=path)
        self.violations = violations

    def __reduce__(self) -> tuple[type["RequestInvalidError"], tuple[list[tuple[str, str]]]]:  # type: ignore[override]
        return type(self), (self.violations,)


def to_status(error: BaseException, request_id: str = "") -> status_pb2.Status:
    """Return the status that tells an exception to a caller; a defect is told with a fixed text.

    Args:
        error: What was raised.
        request_id: Found in the log beside the traceback; told as RequestInfo.
    """
    known = as_granq_error(error)
    hide = known is None
    known = known or InternalError(INTERNAL_MESSAGE)
    invalid = isinstance(known, InvalidArgumentError)
    # A field can be at fault without a bad request, such as a runtime that this machine does not have.
    metadata = {"field": known.field} if known.field and not invalid else {}
    info = error_details_pb2.ErrorInfo(reason=known.reason, domain=DOMAIN, metadata=metadata)
    message = without_paths(known.message)
    status = status_pb2.Status(code=code_of(known), message=message)
    status.details.add().Pack(info)
    violations = [(known.field, message)] if invalid and known.field else []
    if isinstance(known, RequestInvalidError):
        violations = known.violations
    if violations:
        bad = error_details_pb2.BadRequest()
        for path, description in violations:
            bad.field_violations.add(field=path, description=description)
        status.details.add().Pack(bad)
    if hide and request_id:
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    return status


def status_code(status: status_pb2.Status) -> grpc.StatusCode:
    """Return a status's code as gRPC names it."""
    return _BY_NUMBER[status.code]


def status_to_error(error: grpc.RpcError) -> GranqError:
    """Return the error that another service told; the inverse of `to_status`.

    A status without details of this domain comes from gRPC itself, such as UNAVAILABLE when nobody listens.
    """
    known = isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code = error.code() if known else grpc.StatusCode.UNKNOWN
    message = (error.details() if known else None) or code.name
    cls = CLASSES.get(code.value[0], InternalError)
    reason, field = (cls.reason if code in STATUS_CODES.values() else code.name), ""
    told = False
    for detail in _details(error):
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info) and info.domain == DOMAIN:
            told, reason, field = True, info.reason, info.metadata.get("field", field)
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
    if code is grpc.StatusCode.CANCELLED and not told:
        # A server that shuts down drops calls so. Nobody cancelled the work, and the next server will do it.
        return UnavailableError("the server dropped the call; try again", reason="CALL_DROPPED")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not told:
        # The call's own deadline: the peer was too slow, and may answer next time.
        return UnavailableError(message, reason=code.name)
    return cls(message, reason=reason, field=field)


def _details(error: grpc.RpcError) -> list[any_pb2.Any]:
    metadata: Any = error.trailing_metadata() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    for key, value in metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []
