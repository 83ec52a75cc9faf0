"""`granq device` as a device runs it: a process that can import numpy and onnx, and nothing that servers need."""

import errno
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from granq.cli.exits import Exit
from granq.v1 import common_pb2, packages_pb2
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package import write_package
from services.evaluator import device_command
from services.evaluator.runtimes import EngineRuntime
from services.quantizer.calibrate import calibrate
from services.quantizer.config import Quantization
from services.quantizer.integer import to_integer
from services.quantizer.onnx_export import export_trt
from services.quantizer.student import build_student
from tests.support import networks
from tests.support.disks import on_a_small_disk
from tests.support.models import Bottleneck, Residual, captured
from tests.support.onnx_graphs import Builder

SHAPE = (3, 8, 8)
# Not pydantic, which the command line's own library loads.
ABSENT = (
    *("torch", "torchvision", "onnxruntime", "onnxscript", "safetensors", "PIL", "pydantic_settings", "structlog"),
    *("fsspec", "sqlalchemy", "dbos", "protovalidate", "prometheus_client"),
)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed: pip install tensorrt-rtx"
)
Run = Callable[..., subprocess.CompletedProcess[str]]


def packed(trt: bytes, ort: bytes, name: str = "net") -> bytes:
    about = packages_pb2.PackageManifest(model_name=name, input_shape=SHAPE, num_classes=5)
    about.preprocessing.CopyFrom(common_pb2.Preprocessing(pad=2, mean=[0.5], std=[0.25]))
    return write_package(trt, ort, about)


def small(name: str = "net") -> bytes:
    trt = Builder(largest_weight=7).model()
    return packed(trt.SerializeToString(), to_onnx_runtime(trt).SerializeToString(), name)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "net.granq"
    path.write_bytes(small())
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `granq device …` where the modules of ABSENT, and others on demand, cannot be imported."""

    def run(folder: Path, *arguments: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        blocked = tmp_path_factory.mktemp("absent")
        for name in (*ABSENT, *absent):
            (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
        paths = os.pathsep.join(path for path in (str(blocked), os.environ.get("PYTHONPATH", "")) if path)
        command = [sys.executable, "-m", "granq.cli", "device", *arguments]
        environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_what_is_blocked_cannot_be_imported(tmp_path: Path, package: Path, run: Run) -> None:
    done = run(tmp_path, "show", str(package), absent=("numpy",))
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert "granq-pipeline[device]" in done.stderr
    assert "numpy is missing" in done.stderr


@pytest.mark.parametrize(
    ("network", "shape", "quantization", "widths"),
    [
        (Residual, SHAPE, Quantization(3, 4, overrides={"fc": (8, 8), "project.0": (5, 6)}), {3, 5, 8}),
        (Bottleneck, SHAPE, Quantization(4, 8), {4}),
        (networks.NETWORKS["NarrowStem"], networks.SHAPE, Quantization(8, 8), {8}),
    ],
    ids=["residual", "bottleneck", "padded"],
)
def test_exported_networks_come_back_bit_for_bit(
    network: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    quantization: Quantization,
    widths: set[int],
    tmp_path: Path,
    run: Run,
) -> None:
    student = build_student(captured(network(), shape), quantization)
    calibrate(student, torch.randn(16, *shape, generator=torch.Generator().manual_seed(1)))
    trt = export_trt(to_integer(student), shape)
    files = {"model_trt.onnx": trt.SerializeToString(), "model_ort.onnx": to_onnx_runtime(trt).SerializeToString()}
    data = packed(files["model_trt.onnx"], files["model_ort.onnx"])
    (tmp_path / "net.granq").write_bytes(data)
    done = run(tmp_path, "build", "net.granq", "--no-engine")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name: path.read_bytes() for path in (tmp_path / "net").glob("*.onnx")} == files
    assert {path.name for path in (tmp_path / "net").iterdir()} == {*files, "package.json"}
    manifest = json.loads((tmp_path / "net" / "package.json").read_bytes())
    assert manifest["preprocessing"] == {"pad": 2, "mean": [0.5], "std": [0.25]}
    assert {weight["bits"] for weight in manifest["weights"]} == widths
    assert hashlib.sha256(files["model_trt.onnx"]).hexdigest() in done.stdout


@needs_rtx
def test_an_engine_is_built_with_its_manifest(tmp_path: Path, package: Path, run: Run) -> None:
    done = run(tmp_path, "build", str(package), "--out", "made", "--engine", "rtx", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    engine = (tmp_path / "made" / "model.engine").read_bytes()
    assert document["engine"]["engine"]["digest"] == f"sha256:{hashlib.sha256(engine).hexdigest()}"
    assert document["engine"]["onnx_digest"] == document["package"]["onnx_trt"]["digest"]
    assert json.loads((tmp_path / "made" / "model.engine.json").read_bytes())["runtime"] == "RUNTIME_TENSORRT_RTX"
    assert "3 of 3 layers in INT8" in done.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        *("model.engine", "model.engine.json", "model_ort.onnx", "model_trt.onnx", "package.json")
    ]


def test_a_target_that_this_machine_is_not_leaves_the_graphs(tmp_path: Path, package: Path, run: Run) -> None:
    target = tmp_path / "far.yaml"
    target.write_text("title: far\nengine: {runtime: RUNTIME_TENSORRT_RTX, platform: plan9-mips}\n")
    done = run(tmp_path, "build", str(package), "--target", str(target))
    assert done.returncode == Exit.REFUSED
    assert "plan9-mips" in done.stderr
    assert (tmp_path / "net" / "model_ort.onnx").exists()
    assert not list((tmp_path / "net").glob("*.engine"))


def test_for_a_cpu_the_graph_is_the_result(tmp_path: Path, package: Path, run: Run) -> None:
    done = run(tmp_path, "build", str(package), "--target", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] is None
    assert "ONNX Runtime loads model_ort.onnx itself" in done.stderr
    assert not list((tmp_path / "net").glob("*.engine*"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "absent"])
def test_a_damaged_package_is_one_sentence(tmp_path: Path, package: Path, run: Run, damage: str) -> None:
    data = bytearray(package.read_bytes())
    if damage == "absent":
        package.unlink()
    else:
        data[len(data) // 2] ^= 16
        package.write_bytes(data[:-1] if damage == "cut" else data)
    done = run(tmp_path, "build", str(package))
    assert (done.returncode, done.stdout) == (Exit.DATA, "")
    assert {"cut": "cut short", "flipped": "damaged", "absent": "No such file"}[damage] in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("option", [("--engine", "rtx"), ("--target", "l4")])
def test_options_that_contradict_are_refused(tmp_path: Path, package: Path, run: Run, option: tuple[str, str]) -> None:
    done = run(tmp_path, "build", str(package), "--no-engine", *option)
    assert done.returncode == Exit.USAGE
    assert "neither --target nor --engine" in done.stderr


def test_show_lets_no_control_characters_through(tmp_path: Path, run: Run) -> None:
    (tmp_path / "net.granq").write_bytes(small("evil\x1b[2J"))
    done = run(tmp_path, "show", "net.granq")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "in 3 layers, 4.00 bits each" in done.stdout
    described = json.loads(run(tmp_path, "show", "net.granq", "--json").stdout)
    assert described["model_name"] == "evil\x1b[2J"


def test_without_a_runtime_the_graphs_are_the_result(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EngineRuntime, "version", lambda self: None)
    arguments = ["build", str(package), "--out", str(tmp_path / "made")]
    assert device_command.main(arguments) == 0
    assert "neither tensorrt nor tensorrt_rtx is installed" in capsys.readouterr().out
    # Who asks for an engine by name is told that there is none.
    assert device_command.main([*arguments, "--target", '{"runtime": "RUNTIME_TENSORRT"}']) == Exit.REFUSED
    assert "pip install tensorrt" in capsys.readouterr().err


@needs_rtx
def test_an_engine_that_the_disk_cannot_take_leaves_the_graphs_alone(tmp_path: Path, package: Path) -> None:
    out = tmp_path / "made"
    out.mkdir()
    build = ["build", str(package), "--out", str(out), "--target", '{"runtime": "RUNTIME_TENSORRT_RTX"}']
    command = [sys.executable, "-m", "services.evaluator.device_command", *build]
    prefix = on_a_small_disk(out, then='ls -A "$0" >&2')
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == Exit.DATA, done.stderr
    message, *left = done.stderr.splitlines()
    assert "made" in message
    assert "is full; free space" in message
    assert left == ["model_ort.onnx", "model_trt.onnx", "package.json"]


@pytest.mark.parametrize(
    ("batch", "field"), [('{"min": 8, "opt": 4, "max": 2}', "target.batch min"), ('{"opt": 4, "max": 8}', "batch.min")]
)
def test_impossible_batches_build_nothing(
    tmp_path: Path, package: Path, capsys: pytest.CaptureFixture[str], batch: str, field: str
) -> None:
    target = f'{{"runtime": "RUNTIME_TENSORRT_RTX", "batch": {batch}}}'
    arguments = ["build", str(package), "--out", str(tmp_path / "made"), "--target", target]
    assert device_command.main(arguments) == Exit.USAGE
    assert field in capsys.readouterr().err
    assert not list((tmp_path / "made").glob("*.engine*"))


@pytest.mark.parametrize("target", ["[1]", '{"runtime": 9e9}', "{"])
def test_a_target_that_is_no_message_is_refused(
    tmp_path: Path, package: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    arguments = ["build", str(package), "--out", str(tmp_path / "made"), "--target", target]
    assert device_command.main(arguments) == Exit.USAGE
    assert "--target" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "is full"), (errno.EROFS, "Read-only")])
def test_a_disk_that_takes_nothing_leaves_nothing(
    tmp_path: Path,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    words: str,
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    out = tmp_path / "made"
    assert device_command.main(["build", str(package), "--out", str(out)]) == Exit.DATA
    assert words in capsys.readouterr().err
    assert list(out.iterdir()) == []
