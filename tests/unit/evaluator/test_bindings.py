"""What builds and runs use of the runtimes' Python API, held against the real bindings.

TensorRT-RTX is installed with its libraries, TensorRT's newest bindings without theirs; what older bindings answered is
on record (tests/support/tensorrt_api.py).
"""

import ast
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.tensorrt_api import (
    CALLS,
    RECORD,
    ROOT,
    RTX_CALLS,
    RTX_VALUES,
    VALUES,
    ask,
    make_empty_libraries,
    python,
)

SOURCES = [ROOT / "services/evaluator" / name for name in ("build_process.py", "engine_model.py")]
SOURCES += [ROOT / "examples/inference/tensorrt_inference.py"]
RECORDED: dict[str, dict[str, str | None]] = json.loads(RECORD.read_text("utf-8"))
# Names that are Python's or this project's own, not the runtimes'.
OTHERS = {"errors", "warnings", "log", "messages"}

REFUSE = """
import sys, tensorrt_bindings
from pathlib import Path
sys.modules["tensorrt"] = tensorrt_bindings
from granq.v1 import common_pb2, reports_pb2
from services.common.errors import FailedPreconditionError
from services.evaluator.build_process import build
from services.evaluator.build_spec import BuildSpec
from services.evaluator.engine_model import EngineModel

class Gpu:
    stream = 0
    def used_bytes(self): return 0

try:
    build(BuildSpec("tensorrt", [10], "", "", [1, 1, 1], [], None, None), print)
except FailedPreconditionError as error:
    print("build:", error.message)
try:
    EngineModel(b"", reports_pb2.EngineManifest(runtime=common_pb2.RUNTIME_TENSORRT), Gpu())
except FailedPreconditionError as error:
    print("run:", error.message)
"""


def check(found: dict[str, str | None], calls: dict[str, str], values: tuple[str, ...]) -> None:
    assert [name for name in (*calls, *values) if found.get(name) is None] == []
    assert {name: found[name] for name, signature in calls.items() if signature not in (found[name] or "")} == {}


@pytest.fixture(scope="module")
def empty_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or found.origin is None:
        pytest.skip("TensorRT's bindings are not installed: pip install tensorrt_cu13_bindings")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make empty libraries with")
    folder = tmp_path_factory.mktemp("libraries")
    make_empty_libraries(compiler, Path(found.origin).parent, folder)
    return folder


@pytest.mark.parametrize("version", sorted(RECORDED))
def test_older_tensorrts_had_what_is_used_of_it(version: str) -> None:
    check(RECORDED[version], CALLS, VALUES)


def test_the_record_covers_what_targets_have() -> None:
    # JetPack 6.1 and 6.2 bring 10.3, JetPack 7 brings 10.13, and 11.0 dropped what 10 had deprecated.
    assert {".".join(version.split(".")[:2]) for version in RECORDED} >= {"10.3", "10.13", "11.0"}


def test_tensorrt_has_what_is_used_of_it(empty_libraries: Path) -> None:
    check(ask("tensorrt_bindings", [*CALLS, *VALUES], empty_libraries), CALLS, VALUES)


def test_tensorrt_that_cannot_start_is_told_from_a_defect(empty_libraries: Path) -> None:
    build, run = python(REFUSE, libraries=empty_libraries).splitlines()
    assert build.startswith("build: the runtime cannot start here")
    assert re.match(r"run: tensorrt 1\d\.\S+ cannot start", run)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: pip install tensorrt-rtx"
)
def test_tensorrt_rtx_has_what_is_used_of_it() -> None:
    calls, values = CALLS | RTX_CALLS, (*VALUES, *RTX_VALUES)
    check(ask("tensorrt_rtx", [*calls, *values]), calls, values)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_else_is_used(source: Path) -> None:
    checked = {part for name in (*CALLS, *VALUES, *RTX_CALLS, *RTX_VALUES) for part in name.split(".")}
    owners = {"trt", "builder", "network", "parser", "config", "profile", "cache", "tensor"}
    owners |= {"runtime", "engine", "context", "inspector"}
    private = ("_runtime", "_engine", "_context")
    used = {
        node.attr
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id in owners)
            or (isinstance(node.value, ast.Attribute) and node.value.attr in private)
        )
    }
    assert used
    assert used - checked - OTHERS == {"__members__"} & used
