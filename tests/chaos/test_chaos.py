"""The short form of the chaos run; the long one is `make chaos`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("initdb") is None, reason="PostgreSQL is not installed: apt-get install postgresql")
def test_pipelines_come_through_a_short_chaos(tmp_path: Path) -> None:
    options = ["--small", "--pipelines", "2", "--at-once", "2", "--real", "0", "--seconds", "200"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.chaos.run", *options, "--keep", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "| pipelines: scripted workers | 2 |" in run.stdout
    assert "| fault: " in run.stdout
