"""`granq up` with stand-ins for the services: start order, restarts, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from granq.cli.exits import Exit

FAKE = Path(__file__).resolve().parents[2] / "support" / "fake_service.py"
NAMES = ("coordinator", "evaluator", "generator", "quantizer")
PATIENCE = 60.0


class Up:
    """One `granq up` process and what its services wrote about themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.control, self.ready = folder, folder / "control", folder / "ready.json"
        self.control.mkdir()
        for name in NAMES:
            package = folder / "fakes" / "services" / name
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
            shutil.copy(FAKE, package / "__main__.py")
        (folder / "fakes" / "services" / "__init__.py").touch()
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "granq.cli", "up", "--data", str(self.folder / "data"), "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(self.folder / "fakes"), "GRANQ_FAKE": str(self.control)}
        self.process = subprocess.Popen(
            [*command, "--ready-file", str(self.ready), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def starts(self, name: str) -> list[dict[str, Any]]:
        path = self.control / f"{name}.starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def addresses(self) -> dict[str, Any]:
        eventually(self.ready.is_file)
        document: dict[str, Any] = json.loads(self.ready.read_text())
        return document


def eventually(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; fail when it never does."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it never came true")


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    yield up
    if up.process is not None and up.process.poll() is None:
        up.process.kill()
        up.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_starts_four_services_and_stops_them_gracefully(up: Up, number: signal.Signals) -> None:
    process = up.start()
    document = up.addresses()
    services = document["services"]
    assert sorted(services) == list(NAMES)
    assert document["address"] == services["coordinator"]["address"]
    told = up.starts("coordinator")[0]
    for worker in ("generator", "quantizer", "evaluator"):
        assert told[f"GRANQ_{worker.upper()}_ADDRESS"] == services[worker]["address"]
    assert up.starts("quantizer")[0]["GRANQ_GENERATOR_ADDRESS"] == services["generator"]["address"]
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.OK, stderr
    assert services["coordinator"]["address"] in stdout
    assert sorted(p.stem for p in up.control.glob("*.stopped")) == list(NAMES)
    assert not any(running(service["pid"]) for service in services.values())
    assert not up.ready.exists()


def test_a_service_that_dies_is_restarted_at_its_address(up: Up) -> None:
    process = up.start()
    before = up.addresses()["services"]["generator"]
    os.kill(before["pid"], signal.SIGKILL)
    eventually(lambda: len(up.starts("generator")) == 2)
    assert up.starts("generator")[1]["GRANQ_PORT"] == str(before["port"])
    process.terminate()
    _, stderr = process.communicate(timeout=PATIENCE)
    assert "generator ended with signal SIGKILL; restarting" in stderr
    assert process.returncode == Exit.OK


def test_a_service_that_cannot_start_ends_everything_and_shows_its_log(up: Up) -> None:
    (up.control / "evaluator.die").write_text("7")
    process = up.start()
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.FAILED
    assert "evaluator ended with exit code 7" in stderr
    assert "cannot open the database" in stderr
    assert "Traceback" not in stderr
    assert not any(running(start["pid"]) for name in NAMES for start in up.starts(name))


def test_a_killed_supervisor_takes_the_services_with_it(up: Up) -> None:
    process = up.start()
    services = up.addresses()["services"]
    process.kill()
    process.communicate()
    eventually(lambda: not any(running(service["pid"]) for service in services.values()))


def test_what_a_dead_service_left_behind_is_ended(up: Up) -> None:
    child_file = up.control / "quantizer.child"
    child_file.touch()
    process = up.start()
    services = up.addresses()["services"]
    child = int(child_file.read_text())
    assert running(child)
    os.kill(services["quantizer"]["pid"], signal.SIGKILL)
    eventually(lambda: not running(child))
    process.terminate()
    process.communicate(timeout=PATIENCE)


def test_two_cannot_share_a_folder(up: Up, tmp_path: Path) -> None:
    process = up.start()
    up.addresses()
    second = subprocess.run(process.args, capture_output=True, text=True, env=os.environ, timeout=PATIENCE)
    assert second.returncode == Exit.REFUSED
    assert "another 'granq up' uses" in second.stderr
    process.terminate()
    process.communicate(timeout=PATIENCE)
