"""granq engine check: every reason an engine may have not to fit, from every kind of file, without a server."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToJson
from typer.testing import CliRunner, Result

from granq.cli.app import build
from granq.cli.exits import Exit
from granq.engines import machine as machines
from granq.engines.files import find_engines
from granq.engines.fit import misfits
from granq.engines.machine import Gpu, Machine
from granq.v1 import common_pb2, reports_pb2
from tests.support.fake_coordinator import digest_of

TRT, RTX = common_pb2.RUNTIME_TENSORRT, common_pb2.RUNTIME_TENSORRT_RTX
ENGINE = b"engine" * 100
HERE = Machine("linux-x86_64", Gpu("NVIDIA L4", "8.9"), "570.86.10", {RTX: "1.7.1.116", TRT: "10.13.3.9"})


def manifest(**changes: Any) -> reports_pb2.EngineManifest:
    made = reports_pb2.EngineManifest(
        runtime=RTX,
        runtime_version="1.7.1.116",
        compute_capabilities=["8.6", "8.9", "12.0+"],
        platform="linux-x86_64",
        driver_version="570.10",
    )
    made.engine.digest = digest_of(ENGINE)
    made.MergeFrom(reports_pb2.EngineManifest(**{k: v for k, v in changes.items() if k != "compute_capabilities"}))
    if "compute_capabilities" in changes:
        made.ClearField("compute_capabilities")
        made.compute_capabilities.extend(changes["compute_capabilities"])
    return made


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"runtime": TRT, "runtime_version": "10.13.3.9", "compute_capabilities": ["8.9"]}, []),
        ({"compute_capabilities": []}, []),
        ({"compute_capabilities": ["8.0+"]}, []),
        ({"driver_version": "560.35.03"}, []),
        ({"driver_version": "570.999"}, []),
        ({"platform": "linux-aarch64"}, ["built for linux-aarch64, and this machine is linux-x86_64"]),
        ({"runtime_version": "1.8"}, ["TensorRT-RTX 1.8 exactly, and 1.7.1.116 is installed"]),
        ({"compute_capabilities": ["8.6", "12.0+"]}, ["capability 8.6 or 12.0+, and the NVIDIA L4 here has 8.9"]),
        ({"driver_version": "580.95.05"}, ["driver 580.95.05, and the driver here is older: 570.86.10"]),
        ({"platform": "win32-amd64", "compute_capabilities": ["7.5"]}, ["win32-amd64", "7.5"]),
    ],
)
def test_reasons(changes: dict[str, Any], reasons: list[str]) -> None:
    found = misfits(manifest(**changes), HERE)
    assert len(found) == len(reasons)
    assert all(part in text for part, text in zip(reasons, found, strict=True))


def test_a_machine_without_anything_lacks_runtime_and_gpu() -> None:
    found = misfits(manifest(), Machine("linux-x86_64", None, ""))
    assert ["not installed" in found[0], "8.6 or 8.9 or 12.0+ with its driver, and none" in found[1]] == [True, True]
    assert len(found) == 2


def test_a_version_that_nobody_tells_is_left_to_the_runtime() -> None:
    jetson = Machine("linux-x86_64", HERE.gpu, "", {RTX: machines.UNKNOWN_VERSION})
    assert misfits(manifest(), jetson) == []


def write(folder: Path, stem: str = "model", record: str | None = None, content: bytes = ENGINE) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}.engine"
    path.write_bytes(content)
    (folder / f"{stem}.json").write_text(record if record is not None else MessageToJson(manifest()))
    return path


def bundled(folder: Path) -> Path:
    write(folder, "1_rtx-ada")
    path = folder / "bundle.zip"
    with zipfile.ZipFile(path, "w") as bundle:
        for name in ("1_rtx-ada.engine", "1_rtx-ada.json"):
            bundle.write(folder / name, f"engines/{name}")
        bundle.writestr("report.json", "{}")
    return path


def renamed(folder: Path) -> Path:
    path = write(folder)
    path.with_suffix(".json").rename(folder / "model.engine.json")
    return path


@pytest.mark.parametrize(
    "place",
    [
        write,
        lambda folder: write(folder).with_suffix(".json"),
        lambda folder: write(folder).parent,
        bundled,
        renamed,
    ],
)
def test_an_engine_is_found_from_each_file(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    (found,) = find_engines(place(tmp_path / "x"))
    assert (found.manifest, found.intact) == (manifest(), True)


def test_a_manifest_alone_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.unlink()
    assert find_engines(path.with_suffix(".json"))[0].intact is None


def test_fields_of_later_versions_are_borne(tmp_path: Path) -> None:
    record = json.loads(MessageToJson(manifest())) | {"colour": "green"}
    assert find_engines(write(tmp_path, record=json.dumps(record)))[0].intact


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ("{}", "names no runtime"),
        ('{"runtime": "RUNTIME_OTHER"}', "not a manifest"),
        ("\udcff", "not a manifest"),
        (" " * (1 << 21), "too large"),
    ],
)
def test_what_is_not_a_manifest(tmp_path: Path, record: str, message: str) -> None:
    path = write(tmp_path, record="")
    path.with_suffix(".json").write_bytes(record.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        find_engines(path)


def test_damaged_bundles(tmp_path: Path) -> None:
    path = bundled(tmp_path)
    data = path.read_bytes()
    place = data.index(ENGINE) + 7
    path.write_bytes(data[:place] + b"?" + data[place + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        find_engines(path)
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("engines/1.engine", ENGINE)
    with pytest.raises(ValueError, match=r"manifest engines/1\.json is missing"):
        find_engines(path)


def granq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(build(), ["engine", "check", *map(str, arguments)])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "this_machine", lambda: HERE)


@pytest.mark.usefixtures("here")
def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path)
    result = granq(path)
    assert result.exit_code == Exit.OK, result.output
    assert "NVIDIA L4 (8.9)" in result.stdout
    assert f"{path}: fits" in result.stdout
    write(tmp_path, "other", MessageToJson(manifest(platform="linux-aarch64")))
    assert granq(tmp_path).exit_code == Exit.OK  # one of the two does
    result = granq(tmp_path / "other.engine", "--json")
    assert result.exit_code == Exit.REFUSED
    (verdict,) = json.loads(result.stdout)["engines"]
    assert (verdict["fits"], verdict["intact"], len(verdict["reasons"])) == (False, True, 1)
    path.write_bytes(ENGINE[1:])
    result = granq(path)
    assert (result.exit_code, "not what the manifest describes" in result.stdout) == (Exit.DATA, True)


@pytest.mark.usefixtures("here")
def test_the_command_on_other_files(tmp_path: Path) -> None:
    assert granq(tmp_path / "none.engine").exit_code == Exit.DATA
    assert granq(tmp_path).exit_code == Exit.USAGE
    (tmp_path / "lone.engine").write_bytes(ENGINE)
    result = granq(tmp_path / "lone.engine")
    assert result.exit_code == Exit.USAGE
    assert "lone.json or lone.engine.json beside it" in result.output


def test_this_machine_is_asked(tmp_path: Path) -> None:
    result = granq(write(tmp_path, record=MessageToJson(manifest(platform="linux-riscv64"))))
    assert result.exit_code == Exit.REFUSED
    assert f"this machine is {machines.platform_name()}" in result.stdout
