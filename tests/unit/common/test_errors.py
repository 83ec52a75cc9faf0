"""Errors keep class, reason, message and field across processes and across the contract."""

import errno
import pickle

import pytest

from granq.v1 import common_pb2
from services.common import errors
from services.common.errors import CODES, GranqError, InternalError, from_failure, to_failure


@pytest.mark.parametrize("cls", list(CODES), ids=lambda cls: cls.__name__)
def test_survives_pickling_and_failure(cls: type[GranqError]) -> None:
    error = cls("weights are missing", reason="NO_WEIGHTS", field="model.artifact")
    for copy in (pickle.loads(pickle.dumps(error)), from_failure(to_failure(error))):
        assert type(copy) is cls
        assert (copy.message, copy.reason, copy.field) == ("weights are missing", "NO_WEIGHTS", "model.artifact")
        assert str(copy) == "weights are missing"


def test_every_subclass_has_its_own_code() -> None:
    assert set(GranqError.__subclasses__()) == set(CODES)
    assert len(set(CODES.values())) == len(CODES)


def test_default_reason_is_the_classes_own() -> None:
    assert errors.NotFoundError("gone").reason == "NOT_FOUND"


def test_subclass_of_a_listed_class_has_its_code() -> None:
    class WrongShapeError(errors.InvalidArgumentError):
        pass

    assert to_failure(WrongShapeError("shape")).code == 3


def test_defect_is_not_told() -> None:
    failure = to_failure(KeyError("secret"))
    assert failure == common_pb2.Failure(code=13, reason="INTERNAL", message=errors.INTERNAL_MESSAGE)


def test_unlisted_code_is_internal() -> None:
    assert type(from_failure(common_pb2.Failure(code=2, message="?"))) is InternalError


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


OutOfMemoryError.__module__ = "torch"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "OUT_OF_MEMORY"),
        (OutOfMemoryError("CUDA out of memory"), "OUT_OF_GPU_MEMORY"),
        (OSError(errno.ENOSPC, "No space left on device"), "DISK_FULL"),
    ],
)
def test_exhausted_machine_is_told(error: Exception, reason: str) -> None:
    failure = to_failure(error)
    assert (failure.code, failure.reason) == (8, reason)
