"""The granq command: output, JSON and exit codes, against a real gRPC server."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from granq.cli.app import build
from granq.cli.exits import Exit
from granq.v1 import common_pb2, coordinator_pb2
from tests.support.fake_coordinator import FakeCoordinator, bundle, digest_of, serve

CONTENT = b"weights" * 1000


@pytest.fixture
def fake() -> FakeCoordinator:
    return FakeCoordinator()


@pytest.fixture
def address(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("COLUMNS", "200")
    with serve(fake) as address:
        monkeypatch.setenv("GRANQ_ADDRESS", address)
        yield address


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    path.write_bytes(CONTENT)
    return path


def granq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(build(), [str(a) for a in arguments])


def test_quantize_goes_from_a_file_to_an_unpacked_bundle(
    fake: FakeCoordinator, address: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--weight-bits", "3", "--override", "fc:8:8", "--epochs", "2", "--dataset", "fashion", "--split", "t10k"]
    options += ["--dataset-format", "idx", "--mean", "0.286", "--std", "0.353", "--engine", "rtx", "--sm", "8.9"]
    result = granq("quantize", model, *options, "--out", out)
    assert result.exit_code == Exit.OK, result.output
    spec = fake.pipelines["p1"].spec
    assert spec.model.artifact.digest == digest_of(CONTENT)
    assert (spec.quantization.weight_bits, spec.training.epochs, spec.dataset.split) == (3, 2, "t10k")
    assert spec.engines[0].compute_capabilities == ["8.9"]
    assert json.loads((out / "report.json").read_text()) == {"top1": 92.5}
    assert (out / "graphs" / "model.trt.onnx").read_bytes() == b"graph"
    assert sorted(path.name for path in out.iterdir()) == ["graphs", "report.json"]
    for text in (
        "93.50",
        "92.75",
        "92.50",
        "92.25",
        "W3A4* simulated",
        "which no device runs",
        "no TensorRT here",
        str(out / "report.json"),
    ):
        assert text in result.stdout


def test_quantize_writes_one_json_document(address: str, model: Path, tmp_path: Path) -> None:
    result = granq("quantize", model, "--out", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert document["pipeline"]["state"] == "PIPELINE_STATE_SUCCEEDED"
    assert document["bundle_dir"] == str(tmp_path / "out")


def test_quantize_can_leave_the_pipeline_to_the_server(fake: FakeCoordinator, address: str, model: Path) -> None:
    first = granq("quantize", model, "--detach", "--request-id", "same")
    again = granq("quantize", digest_of(CONTENT), "--detach", "--request-id", "same", "--json")
    assert first.stdout == "p1\n"
    assert json.loads(again.stdout)["pipeline"]["pipeline_id"] == "p1"
    assert "WatchPipeline" not in fake.calls


def test_a_recipe_fills_what_the_command_line_leaves(fake: FakeCoordinator, address: str, model: Path) -> None:
    granq("quantize", model, "--detach", "--recipe", "simulated/cifar10-resnet20-w3a3", "--epochs", "9", "-a", "5")
    spec = fake.pipelines["p1"].spec
    assert (spec.quantization.weight_bits, spec.quantization.activation_bits) == (3, 5)
    assert (spec.training.epochs, spec.training.warmup_epochs, list(spec.engines)) == (9, 4, [])
    granq("quantize", model, "--detach", "--recipe", "deployable/small", "--engine", "none", "--mode", "co-train")
    spec = fake.pipelines["p2"].spec
    assert (spec.training.mode, spec.synthesis.iterations) == (common_pb2.TRAINING_MODE_CO_TRAIN, 500)
    assert not spec.engines
    granq("quantize", model, "--detach", "--recipe", "deployable/small", "--engine", "rtx")
    assert [e.runtime for e in fake.pipelines["p3"].spec.engines] == [common_pb2.RUNTIME_TENSORRT_RTX]
    granq("quantize", model, "--detach")
    spec = fake.pipelines["p4"].spec
    assert (spec.quantization.weight_bits, spec.quantization.activation_bits, len(spec.engines)) == (4, 4, 1)


def test_a_recipe_may_prepare_the_labelled_set(
    fake: FakeCoordinator, address: str, model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "dataset: {path: sets/imagenet, format: DATASET_FORMAT_WEBDATASET, preprocessing: {resize: 256}}\n"
    )
    granq("quantize", model, "--detach", "--recipe", recipe, "--limit", "100")
    dataset = fake.pipelines["p1"].spec.dataset
    assert (dataset.path, dataset.preprocessing.resize, dataset.limit) == ("sets/imagenet", 256, 100)
    granq("quantize", model, "--detach", "--recipe", recipe, "--dataset", "other", "--center-crop", "224")
    dataset = fake.pipelines["p2"].spec.dataset
    assert (dataset.path, dataset.format) == ("other", common_pb2.DATASET_FORMAT_WEBDATASET)
    assert (dataset.preprocessing.resize, dataset.preprocessing.center_crop) == (256, 224)


def test_a_wrong_recipe_is_a_usage_error(address: str, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("training:\n  epoch: 3\n")
    result = granq("quantize", model, "--recipe", recipe)
    assert result.exit_code == Exit.USAGE
    assert "mine.yaml:2: training.epoch: no such field" in result.stderr


def test_recipes_are_listed_and_shown() -> None:
    listed = json.loads(granq("recipes", "list", "--json").stdout)
    assert {"deployable/default", "simulated/imagenet-resnet50-w4a4"} <= {entry["name"] for entry in listed}
    assert "deployable/small" in granq("recipes", "list").stdout
    shown = granq("recipes", "show", "deployable/small").stdout
    assert "TRAINING_MODE_REPLAY" in shown
    assert json.loads(granq("recipes", "show", "deployable/small", "--json").stdout)["training"]["epochs"] == 3
    unknown = granq("recipes", "show", "none")
    assert (unknown.exit_code, "no recipe 'none'" in unknown.stderr) == (Exit.USAGE, True)


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (coordinator_pb2.PIPELINE_STATE_FAILED, Exit.FAILED),
        (coordinator_pb2.PIPELINE_STATE_CANCELLED, Exit.CANCELLED),
    ],
)
def test_the_end_of_a_pipeline_is_the_exit_code(
    fake: FakeCoordinator, address: str, model: Path, state: coordinator_pb2.PipelineState, code: Exit
) -> None:
    def end(pipeline: coordinator_pb2.Pipeline) -> None:
        pipeline.state = state
        if state == coordinator_pb2.PIPELINE_STATE_FAILED:
            pipeline.failure.message, pipeline.failure.reason = "no [BatchNorm] left", "MODEL_NO_BATCH_NORM"

    fake.after_submit = end
    result = granq("quantize", model)
    assert result.exit_code == code
    assert "granq pipelines retry p1" in result.stderr
    if code == Exit.FAILED:
        assert "no [BatchNorm] left [MODEL_NO_BATCH_NORM]" in result.stdout


def test_watch_writes_json_lines(fake: FakeCoordinator, address: str) -> None:
    fake.add("p", events=3)
    lines = [
        json.loads(line) for line in granq("pipelines", "watch", "p", "--json", "--after", "1").stdout.splitlines()
    ]
    assert [line["event"]["sequence"] for line in lines[:-1]] == ["2", "3"]
    assert lines[-1]["pipeline"]["pipeline_id"] == "p"


def test_watch_prints_progress_for_people(fake: FakeCoordinator, address: str) -> None:
    fake.add("p", events=3)
    result = granq("pipelines", "watch", "p")
    assert "quantize 3/3  training  loss_student 0.3333" in result.stdout


def test_list_show_and_delete(fake: FakeCoordinator, address: str) -> None:
    fake.add("good")
    fake.add("bad", state=coordinator_pb2.PIPELINE_STATE_FAILED)
    listed = json.loads(granq("pipelines", "list", "--json", "--state", "failed").stdout)
    assert [pipeline["pipeline_id"] for pipeline in listed] == ["bad"]
    assert [line.split()[0] for line in granq("pipelines", "list").stdout.splitlines()] == ["id", "bad", "good"]
    assert "FAILED" in granq("pipelines", "show", "bad").stdout
    assert granq("pipelines", "cancel", "bad", "--wait").stdout == "bad CANCELLED\n"
    assert granq("pipelines", "retry", "bad").stdout == "bad QUEUED\n"
    assert json.loads(granq("pipelines", "delete", "bad", "--json").stdout)["deleted"]
    assert list(fake.pipelines) == ["good"]


def test_artifacts_go_in_and_out(fake: FakeCoordinator, address: str, model: Path, tmp_path: Path) -> None:
    digest = granq("artifacts", "put", model).stdout.strip()
    assert digest == digest_of(CONTENT)
    result = granq("artifacts", "get", digest, tmp_path / "copy", "--json")
    assert json.loads(result.stdout)["size_bytes"] == len(CONTENT)
    assert (tmp_path / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("pipelines", "show", "nothing"), Exit.REFUSED, "no pipeline nothing [PIPELINE_NOT_FOUND]"),
        (("pipelines", "retry", "done"), Exit.REFUSED, "it has succeeded"),
        (("quantize", "/does/not/exist.pt2"), Exit.DATA, "No such file"),
        (("quantize", "MODEL", "-w", "9"), Exit.USAGE, "spec.quantization.weight_bits: must be 2 to 8"),
        (("quantize", "MODEL", "--override", "fc"), Exit.USAGE, "LAYER:W:A"),
        (("quantize", "MODEL", "--dataset", "folder"), Exit.USAGE, "--dataset-format"),
        (("quantize", "MODEL", "--mode", "fast"), Exit.USAGE, "co-train"),
        (("pipelines", "list", "--limit", "0"), Exit.USAGE, "limit"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(
    fake: FakeCoordinator, address: str, model: Path, arguments: tuple[str, ...], code: Exit, text: str
) -> None:
    fake.add("done")
    result = granq(*(str(model) if a == "MODEL" else a for a in arguments))
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_no_server_is_said_with_the_way_out(model: Path, fake: FakeCoordinator) -> None:
    with serve(fake) as address:
        pass
    result = granq("pipelines", "list", "--address", address)
    assert result.exit_code == Exit.UNREACHABLE
    assert f"no coordinator at {address} ('granq up' starts one)" in result.stderr


def test_damaged_content_has_its_own_exit_code(fake: FakeCoordinator, address: str, tmp_path: Path) -> None:
    fake.blobs[digest_of(CONTENT)] = CONTENT
    fake.corrupt.add(digest_of(CONTENT))
    result = granq("artifacts", "get", digest_of(CONTENT), tmp_path / "copy")
    assert result.exit_code == Exit.DATA
    assert not (tmp_path / "copy").exists()


def test_a_bundle_cannot_write_outside_its_folder(
    fake: FakeCoordinator, address: str, model: Path, tmp_path: Path
) -> None:
    def end(pipeline: coordinator_pb2.Pipeline) -> None:
        fake.succeed(pipeline)
        content = bundle({"../escaped": b"x"})
        pipeline.results.bundle.digest = digest_of(content)
        fake.blobs[digest_of(content)] = content

    fake.after_submit = end
    result = granq("quantize", model, "--out", tmp_path / "out")
    assert result.exit_code == Exit.DATA
    assert "outside its folder" in result.stderr
    assert not (tmp_path / "escaped").exists()


def test_ctrl_c_leaves_the_pipeline_running(fake: FakeCoordinator, address: str) -> None:
    fake.add("p", events=2, state=coordinator_pb2.PIPELINE_STATE_RUNNING)
    command = [sys.executable, "-m", "granq.cli", "pipelines", "watch", "p", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background of a shell hands on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == Exit.DETACHED
    assert f"granq pipelines watch p --address {address}" in stderr
    assert "Traceback" not in stderr
    assert "CancelPipeline" not in fake.calls
