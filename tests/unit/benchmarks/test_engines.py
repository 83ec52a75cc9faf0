from pathlib import Path

import pytest
import torch

from benchmarks import engines
from benchmarks.accuracy.bench import Bench
from granq.v1 import common_pb2
from services.common.errors import FailedPreconditionError
from services.common.models import LoadedModel
from services.evaluator.graph import load_graph
from services.quantizer.batches import Batch
from services.quantizer.config import Quantization
from tests.support.models import Residual, captured, remember

SHAPE = (3, 8, 8)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    network = remember(captured(Residual(), SHAPE), torch.randn(400, *SHAPE, generator=generator))
    model = LoadedModel(network, SHAPE, 10, common_pb2.MODEL_FORMAT_TORCH_EXPORT)
    bench = Bench(model, torch.randn(40, *SHAPE, generator=generator), torch.zeros(0, dtype=torch.int64), tmp_path)
    bench.labels = bench.teacher_logits.argmax(1)
    return bench


def test_a_row_for_each_width(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Batch(torch.randn(32, *SHAPE), torch.zeros(32, dtype=torch.int64), torch.randn(32, 10))
    built: list[Path] = []

    def build(graph: Path) -> tuple[str, str, str]:
        built.append(graph)
        return f"{len(load_graph(graph, 'onnx').layers)} of 6", "0.5", "1,000"

    out = tmp_path / "table.md"
    engines.engines(bench, [(8, 8), (4, 4)], data, (0, 8, 0), "residual", build, ["A note."], out)
    text = out.read_text("utf-8")
    assert capsys.readouterr().out == text
    assert "# Forms of residual" in text
    assert "100.00 % top-1 of 40 images" in text
    assert "- A note." in text
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    eight, four = (dict(zip(header, row, strict=True)) for row in rows)
    assert tuple(header) == engines.COLUMNS
    for row, bits in ((eight, "8/8"), (four, "4/4")):
        assert row["W/A"] == bits
        assert row["`trt` − codes"] == "0"
        assert float(row["relative"]) < 1e-5
        assert (row["INT8 in ONNX Runtime"], row["INT8 in the plan"]) == ("3 of 6", "6 of 6")
        assert (row["build, s"], row["engine, bytes"]) == ("0.5", "1,000")
        assert row["`trt`"] == row["`ort`"]
    assert float(eight["`trt`"]) > 90
    packages = [int(row["package, bytes"].replace(",", "")) for row in (eight, four)]
    assert packages[1] < packages[0] < int(eight["`trt`, bytes"].replace(",", ""))
    assert len(built) == 2


def test_a_difference_between_forms_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    student = bench.student(Quantization(8, 8), torch.randn(16, *SHAPE))
    monkeypatch.setattr(engines, "simulated_logits", lambda model, images: bench.teacher_logits)
    row = dict(zip(engines.COLUMNS[1:], engines.measure(bench, student, "", lambda graph: ("", "", "")), strict=True))
    assert float(row["`trt` − codes"]) > 1e-3


def test_differences() -> None:
    wanted = torch.tensor([[1.0, -4.0], [100.0, 0.0]])
    got = torch.tensor([[1.5, -4.0], [100.0, 2.0]])
    assert engines.difference(got, wanted) == (2.0, 0.125)
    assert engines.difference(wanted, wanted) == (0.0, 0.0)
    assert engines.difference(torch.zeros(1, 2), torch.zeros(1, 2)) == (0.0, 0.0)


def test_an_engine_that_cannot_be_built_leaves_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise FailedPreconditionError("there is no GPU here", reason="GPU_REQUIRED")

    monkeypatch.setattr(engines, "build_plan", refuse)
    assert engines.build_engine(tmp_path / "m.onnx", common_pb2.EngineTarget()) == ("GPU_REQUIRED", "–", "–")
    assert "there is no GPU here" in capsys.readouterr().err
