"""The rules for targets are the contract's, to the letter."""

import protovalidate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granq.engines.target import fault_of
from granq.v1 import common_pb2

NUMBERS = st.sampled_from([-1, 0, 1, 2, 8, 4096, 4097])
TARGETS = st.builds(
    common_pb2.EngineTarget,
    runtime=st.sampled_from([0, 1, 2, 3]),
    compute_capabilities=st.lists(st.sampled_from(["8.6", "12.0", "1.2", "8", "8.66", "8.6\n", ""]), max_size=3)
    | st.integers(7, 9).map(lambda count: [f"{n}.0" for n in range(count)]),
    batch=st.none() | st.builds(common_pb2.BatchProfile, min=NUMBERS, opt=NUMBERS, max=NUMBERS),
    workspace_bytes=st.sampled_from([None, -1, 0, (1 << 20) - 1, 1 << 20, 1 << 40]),
    optimization_level=st.sampled_from([None, -1, 0, 5, 6]),
    name=st.sampled_from(["", "a", "jetson-orin.nano_2", "-a", "A", "a" * 64, "a" * 65, "a/b"]),
    platform=st.sampled_from(["", "linux-x86_64", "linux", "Linux-x86", "linux-"]),
    runtime_version=st.sampled_from(["", "10", "10.3", "10.", "v10", ".3"]),
)


@settings(max_examples=200, deadline=None)
@given(TARGETS)
def test_the_validator_says_the_same(target: common_pb2.EngineTarget) -> None:
    paths = [violation.proto.field for violation in protovalidate.collect_violations(target)]
    violations = {path.elements[0].field_name for path in paths if path is not None}
    fault = fault_of(target)
    if fault is None:
        assert not violations
    else:
        assert fault[0].split(".")[0] in violations


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"batch": common_pb2.BatchProfile(min=8, opt=4, max=2)}, "batch"),
        ({"batch": common_pb2.BatchProfile(opt=1, max=1)}, "batch.min"),
        ({"runtime": 99}, "runtime"),
        ({}, None),
    ],
)
def test_faults_are_told_by_field(fields: dict[str, object], field: str | None) -> None:
    fault = fault_of(common_pb2.EngineTarget(**fields))  # type: ignore[arg-type]
    assert (fault[0] if fault else None) == field
