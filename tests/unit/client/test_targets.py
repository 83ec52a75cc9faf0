"""Shipped targets satisfy the contract, and files of one's own are checked by line."""

from pathlib import Path

import protovalidate
import pytest

from granq import targets
from granq.cli.targets import Engine, parse_engines
from granq.v1 import common_pb2

TRT, RTX, ORT = common_pb2.RUNTIME_TENSORRT, common_pb2.RUNTIME_TENSORRT_RTX, common_pb2.RUNTIME_ONNXRUNTIME
SHIPPED = {
    "a100": (TRT, ["8.0"]),
    "cpu": (ORT, []),
    "h100": (TRT, ["9.0"]),
    "jetson-agx-orin": (TRT, ["8.7"]),
    "jetson-agx-thor": (TRT, ["11.0"]),
    "jetson-orin-nano": (TRT, ["8.7"]),
    "jetson-orin-nx": (TRT, ["8.7"]),
    "l4": (TRT, ["8.9"]),
    "rtx-ada": (RTX, ["8.9"]),
    "rtx-blackwell": (RTX, ["12.0"]),
}
MINIMAL = "title: A board\nengine: {runtime: RUNTIME_TENSORRT}\n"


def test_what_is_shipped() -> None:
    found = {name: targets.load(name).engine for name in targets.names()}
    assert {name: (e.runtime, list(e.compute_capabilities)) for name, e in found.items()} == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_targets_satisfy_the_contract(name: str) -> None:
    target = targets.load(name)
    protovalidate.validate(target.engine)
    assert target.engine.name == target.name == name
    assert target.title
    assert len(target.title) <= 80
    assert target.notes
    assert target.engine.HasField("batch")
    jetson = name.startswith("jetson")
    assert (target.engine.platform == "linux-aarch64") == jetson
    assert (target.engine.runtime_version == "10") == jetson
    assert bool(target.engine.platform) == (target.engine.runtime != ORT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: A board\n", "t.yaml: engine: is missing"),
        ("engine: {runtime: RUNTIME_TENSORRT}\n", "t.yaml: title: is missing"),
        ("title: A board\nengine: {}\n", "t.yaml:2: engine.runtime: is missing"),
        ("title: A board\nengine:\n  runtime: RUNTIME_FAST\n", r"t.yaml:3: engine\.runtime: .*RUNTIME_FAST"),
        ("title: A board\nengine:\n  speed: 3\n", r"t.yaml:3: engine\.speed: no such field; EngineTarget has"),
        (f"{MINIMAL}price: 3\n", "t.yaml:3: price: no such field; a target has title, engine, notes"),
        (f"{MINIMAL}title: B\n", "t.yaml:3: title: given twice"),
        (f"{MINIMAL}notes: text\n", "t.yaml:3: notes: must be a list"),
        (f"{MINIMAL}notes: [3]\n", r"t.yaml:3: notes\[0\]: must be a text"),
        ("title: ' '\nengine: {runtime: RUNTIME_TENSORRT}\n", "t.yaml:1: title: must be a text"),
        ("title: A\nengine:\n  runtime: 2\n  batch: {min: 8, opt: 4, max: 2}\n", r"t.yaml:3: engine\.batch: .*ascend"),
        ("title: A\nengine: {runtime: 2, batch: {min: 0, opt: 4, max: 8}}\n", r"engine\.batch\.min: must be 1 to 4096"),
        ("title: A\nengine: {runtime: 2, workspace_bytes: 5}\n", r"engine\.workspace_bytes: .*1 MiB"),
        ("- 1\n", "the target: must be a mapping"),
        ("", "empty"),
        ("title: [", "not a YAML document"),
        ("title: !!python/object/apply:os.system ['true']\nengine: {runtime: 2}\n", "title: must be a text"),
    ],
)
def test_what_is_not_a_target_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targets.parse(text, "t.yaml")


def test_names_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    target = targets.load(str(tmp_path / "mine.yaml"))
    assert (target.name, target.engine.name, target.notes) == ("mine", "mine", ())
    with pytest.raises(ValueError, match="did you mean jetson-orin-nano"):
        targets.load("jetson-orin-nanno")
    with pytest.raises(ValueError, match=r"no target '\.\./pyproject'"):
        targets.load("../pyproject")
    with pytest.raises(FileNotFoundError):
        targets.load(str(tmp_path / "none.yaml"))


def test_engines_of_a_command_line() -> None:
    found = parse_engines(None, [], ["rtx-ada", "cpu", "jetson-orin-nx"])
    assert [engine.name for engine in found] == ["rtx-ada", "cpu", "jetson-orin-nx"]
    with pytest.raises(ValueError, match="named twice"):
        parse_engines(None, [], ["cpu", "cpu"])
    for engine, capabilities in ((Engine.RTX, []), (None, ["8.9"])):
        with pytest.raises(ValueError, match="leave out --engine and --sm"):
            parse_engines(engine, capabilities, ["cpu"])
