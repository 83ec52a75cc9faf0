import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.jobs.process import child_environment


@pytest.mark.parametrize(("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_the_operator_chose_otherwise(
    chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    assert child_environment()["OMP_WAIT_POLICY"] == expected
    assert os.environ.get("OMP_WAIT_POLICY") == chosen


def test_a_child_finds_modules_wherever_it_runs(tmp_path: Path) -> None:
    code = "import services.common.jobs.process as module; print(module.__file__)"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=child_environment(),
        cwd=tmp_path,
        capture_output=True,
        check=True,
        text=True,
    )
    from services.common.jobs import process

    assert Path(run.stdout.strip()).resolve() == Path(process.__file__).resolve()


def test_a_child_keeps_freed_memory_unless_the_operator_chose_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    code = """
import resource
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 64_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults() -> int:
        run = [sys.executable, "-c", code]
        return int(subprocess.run(run, env=child_environment(), capture_output=True, check=True, text=True).stdout)

    pages = 64_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults() >= pages // 2
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert faults() < pages // 10
