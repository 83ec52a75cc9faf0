"""The main job as a user starts it, with few iterations: model in, bundle out, through four real servers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "fashion_mnist" / "demo.py"
# At eight bits even so few iterations lose next to nothing, unless a stage makes another model of what it is given.
FEW = [
    *("--weight-bits", "8", "--activation-bits", "8", "--mode", "co-train", "--epochs", "2", "--warmup-epochs", "1"),
    *("--iterations", "3", "--synthesis-iterations", "3", "--images", "64"),
]
IMAGES = 500


def servers_of(data: Path) -> list[int]:
    """Return the processes that were told to keep their artifacts below ``data``."""
    url = (data / "artifacts").as_uri()
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRANQ_ARTIFACT_URL") == url:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo(tmp_path: Path, fashion_mnist: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    command = [sys.executable, str(DEMO), "--out", str(out), "--data", str(data), *FEW, "--limit", str(IMAGES)]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=580)
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(data.glob("logs/*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    results = json.loads((out / "report.json").read_text())["results"]
    measured = {m["form"].removeprefix("MEASURED_FORM_"): m for m in results["evaluation"]["measurements"]}
    assert {"FLOAT", "SIMULATED", "ONNX_TRT", "ONNX_ORT"} <= set(measured)
    assert all(m["accuracy"]["images"] == IMAGES for m in measured.values())
    assert measured["FLOAT"]["accuracy"]["top1"] > 85.0
    assert all(measured[form]["accuracy"]["agreement"] >= 98.0 for form in ("ONNX_TRT", "ONNX_ORT"))
    assert abs(measured["SIMULATED"]["accuracy"]["top1"] - measured["ONNX_TRT"]["accuracy"]["top1"]) <= 0.4
    for form in ("FLOAT", "SIMULATED", "ONNX_TRT", "ONNX_ORT"):
        assert f"{measured[form]['accuracy']['top1']:.2f}" in done.stdout
    assert {"model_trt.onnx", "model_ort.onnx", "report.json"} <= {path.name for path in out.iterdir()}
    assert "engine: " in done.stdout
    assert str(out / "report.json") in done.stdout
    assert servers_of(data) == []
