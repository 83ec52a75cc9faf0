"""Statuses that gRPC itself or another project's server makes are told as errors too."""

import pickle

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.common import errors
from services.common.rpc.status import DETAILS_KEY, RequestInvalidError, status_to_error, to_status


def rpc_error(code: grpc.StatusCode, details: str = "", status: status_pb2.Status | None = None) -> grpc.RpcError:
    trailing = grpc.aio.Metadata(*([] if status is None else [(DETAILS_KEY, status.SerializeToString())]))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details, "")


@pytest.mark.parametrize(
    ("code", "cls", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError, "UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.UnavailableError, "DEADLINE_EXCEEDED"),
        # Dropped by a server that ends: nobody cancelled the work.
        (grpc.StatusCode.CANCELLED, errors.UnavailableError, "CALL_DROPPED"),
        (grpc.StatusCode.UNIMPLEMENTED, errors.InternalError, "UNIMPLEMENTED"),
        (grpc.StatusCode.UNKNOWN, errors.InternalError, "UNKNOWN"),
        (grpc.StatusCode.OUT_OF_RANGE, errors.InvalidArgumentError, "OUT_OF_RANGE"),
    ],
)
def test_status_without_details(code: grpc.StatusCode, cls: type[errors.GranqError], reason: str) -> None:
    told = status_to_error(rpc_error(code))
    assert (type(told), told.reason) == (cls, reason)


def test_told_cancellation_is_kept() -> None:
    status = to_status(errors.CancelledError("on request"))
    told = status_to_error(rpc_error(grpc.StatusCode.CANCELLED, "on request", status))
    assert type(told) is errors.CancelledError


def test_another_domains_reason_is_not_taken_over() -> None:
    status = status_pb2.Status(code=5)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="THEIRS", domain="example.com"))
    assert status_to_error(rpc_error(grpc.StatusCode.NOT_FOUND, "gone", status)).reason == "NOT_FOUND"


def test_error_without_a_status() -> None:
    assert type(status_to_error(grpc.RpcError())) is errors.InternalError


def test_broken_rules_survive_pickling() -> None:
    error = RequestInvalidError([("a.b", "is wrong"), ("c", "too")])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.violations, copy.field, copy.message) == (error.violations, "a.b", "a.b: is wrong")
