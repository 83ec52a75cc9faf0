"""The client package: light imports, errors, retry policy."""

import json
import pickle
import subprocess
import sys

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2, status_pb2

import granq
from granq.channel import service_config
from granq.cli.session import DEFAULT_ADDRESS
from granq.errors import GranqClientError, read_details
from granq.v1 import artifacts_pb2, coordinator_pb2
from services.common.errors import NotFoundError
from services.common.rpc.status import to_status


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_granq_loads_neither_grpc_nor_protobuf() -> None:
    loaded = modules_after("import granq")
    assert not loaded & {"grpc", "google.protobuf", "typer", "torch"}


def test_client_needs_grpc_and_protobuf_only() -> None:
    loaded = modules_after("import granq; granq.Client, granq.pipeline_spec, granq.GranqClientError")
    assert {"grpc", "google.protobuf"} <= loaded
    assert not loaded & {"google.rpc", "grpc_status", "torch", "numpy", "typer", "rich", "protovalidate", "pydantic"}


def test_help_needs_no_grpc() -> None:
    loaded = modules_after("from granq.cli.app import build; build()")
    assert not loaded & {"grpc", "google.protobuf", "asyncio", "rich.progress"}


def test_every_public_name_exists_and_no_other() -> None:
    for name in granq.__all__:
        assert getattr(granq, name) is not None
    assert dir(granq) == sorted(granq.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = granq.nothing


def test_cli_and_client_agree_on_the_default_address() -> None:
    assert granq.DEFAULT_ADDRESS == DEFAULT_ADDRESS


def test_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom granq.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "granq-pipeline[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_retry_policy_names_existing_methods_that_may_be_repeated() -> None:
    assert artifacts_pb2.DESCRIPTOR
    assert coordinator_pb2.DESCRIPTOR
    pool = descriptor_pool.Default()
    may_not_repeat = {"RetryPipeline", "DeletePipeline"}
    for config in json.loads(service_config())["methodConfig"]:
        policy = config["retryPolicy"]
        assert policy["retryableStatusCodes"] == ["UNAVAILABLE"]
        assert 2 <= policy["maxAttempts"] <= 5
        for name in config["name"]:
            service = pool.FindServiceByName(name["service"])
            method = service.methods_by_name[name["method"]]
            assert not method.client_streaming
            assert not method.server_streaming
            assert name["method"] not in may_not_repeat


def test_error_text_names_field_and_reason() -> None:
    error = GranqClientError(grpc.StatusCode.INVALID_ARGUMENT, "too many", reason="BITS", field="spec.bits")
    assert str(error) == "spec.bits: too many [BITS]"
    assert str(GranqClientError(grpc.StatusCode.NOT_FOUND, "gone")) == "gone [NOT_FOUND]"


def test_error_survives_pickling() -> None:
    error = GranqClientError(grpc.StatusCode.ABORTED, "busy", reason="R", field="f")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.message, copy.reason, copy.field) == (grpc.StatusCode.ABORTED, "busy", "R", "f")


def test_details_are_read_from_the_wire_format() -> None:
    status = status_pb2.Status(code=3, message="m" * 300)
    info = error_details_pb2.ErrorInfo(reason="MODEL_NO_BATCH_NORM", domain="granq", metadata={"a": "b"})
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay={"seconds": 1}))
    status.details.add().Pack(info)
    violations = [{"field": "spec.model", "description": "d"}, {"field": "other", "description": "d"}]
    status.details.add().Pack(error_details_pb2.BadRequest(field_violations=violations))
    assert read_details(status.SerializeToString()) == ("MODEL_NO_BATCH_NORM", "spec.model")


def test_a_field_at_fault_in_a_good_request_is_read_too() -> None:
    error = NotFoundError("gone", reason="ARTIFACT_NOT_FOUND", field="spec.model.artifact.digest")
    assert read_details(to_status(error).SerializeToString()) == (error.reason, error.field)


@pytest.mark.parametrize("broken", [b"\x1a\xff\x01abc", b"\x1f", b"\x80"])
def test_broken_details_are_errors_that_the_caller_expects(broken: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        read_details(broken)
