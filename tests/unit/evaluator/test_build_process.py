import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import FailedPreconditionError, GranqError, InvalidArgumentError
from services.evaluator.build_process import build
from services.evaluator.build_spec import (
    BuildOutcome,
    BuildSpec,
    BuiltTensor,
    error_line,
    outcome_line,
    parse_line,
    progress_line,
)
from services.evaluator.runtimes import TENSORRT
from tests.support.fake_tensorrt import FakeTensorRT


def spec_of(folder: Path, **changes: Any) -> BuildSpec:
    (folder / "m.onnx").write_bytes(b"graph")
    fields: dict[str, Any] = {
        "module": TENSORRT.module,
        "strong_typing_majors": sorted(TENSORRT.strong_typing_majors),
        "onnx": str(folder / "m.onnx"),
        "plan": str(folder / "plan"),
        "batch": [1, 8, 64],
        "capabilities": [],
        "workspace_bytes": None,
        "optimization_level": 3,
    }
    return BuildSpec(**(fields | changes))


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 2), ("10.13.3.9", 2), ("11.4.0.106", 0)])
def test_tensorrt_10_and_11(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, flags: int) -> None:
    fake = FakeTensorRT(version)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    told: list[tuple[str, int, int]] = []
    outcome = build(spec_of(tmp_path, workspace_bytes=1 << 20), lambda *progress: told.append(progress))
    assert fake.calls == {
        "flags": flags,
        "onnx": b"graph",
        "workspace": ("workspace", 1 << 20),
        "level": 3,
        "profile": ("images", (1, 3, 8, 8), (8, 3, 8, 8), (64, 3, 8, 8)),
    }
    assert (tmp_path / "plan").read_bytes() == b"plan"
    assert outcome.version == version
    assert outcome.tensors == [
        BuiltTensor("images", True, "FLOAT", [-1, 3, 8, 8]),
        BuiltTensor("logits", False, "FLOAT", [-1, 5]),
    ]
    assert outcome.warnings == ["CUDA lazy loading is not enabled."]
    assert all(TENSORRT.why_harmless(w) for w in outcome.warnings)
    assert told == [("Building Engine", 0, 2), ("Building Engine", 1, 2)]


@pytest.mark.parametrize(
    ("fail", "kind", "words"),
    [
        ("builder", FailedPreconditionError, "CUDA initialization failure"),
        ("parse", InvalidArgumentError, "UNSUPPORTED_NODE"),
        ("profile", FailedPreconditionError, "batch profile"),
        ("build", FailedPreconditionError, "Error Code 10"),
    ],
)
def test_failures_carry_the_runtimes_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, kind: type[GranqError], words: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("11.4.0.106", fail))
    with pytest.raises(kind, match=words):
        build(spec_of(tmp_path), lambda *progress: None)
    assert not (tmp_path / "plan").exists()


def test_messages_survive_the_pipe() -> None:
    outcome = BuildOutcome("1.7", [BuiltTensor("x", True, "FLOAT", [-1, 3])], ["zwölf\nlines"], 1.5)
    assert parse_line(outcome_line(outcome)) == outcome
    assert parse_line(progress_line("phase", 3, 7)) == ("phase", 3, 7)
    error = parse_line(error_line(InvalidArgumentError("what", reason="WHY", field="where")))
    assert isinstance(error, InvalidArgumentError)
    assert (error.message, error.reason, error.field) == ("what", "WHY", "where")


@pytest.mark.parametrize(
    ("fail", "stored", "used", "written"),
    [
        ("", None, [b""], b"+timed"),
        ("", b"old", [b"old"], b"old+timed"),
        ("cache", b"of another version", [b""], b"+timed"),
    ],
)
def test_a_timing_cache_is_used_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, stored: bytes | None, used: list[bytes], written: bytes
) -> None:
    fake = FakeTensorRT("10.13.3.9", fail)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    cache = tmp_path / "timing.cache"
    if stored is not None:
        cache.write_bytes(stored)
    outcome = build(spec_of(tmp_path, timing_cache=str(cache)), lambda *progress: None)
    assert fake.calls["caches"] == used
    assert cache.read_bytes() == written
    # A cache that was refused is not this build's fault, so its warning does not fail it.
    assert outcome.warnings == ["CUDA lazy loading is not enabled."]
