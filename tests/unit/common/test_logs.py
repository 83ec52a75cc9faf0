"""Every record is one line with its fields, whoever wrote it."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from services.common.logs import configure_logging, get_logger


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def test_own_and_foreign_records_carry_the_constants(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "INFO", {"service": "quantizer", "job_id": "j1", "pipeline_id": ""})
    with structlog.contextvars.bound_contextvars(stage="train"):
        get_logger("own").info("step", loss=0.5)
    logging.getLogger("library").warning("careful %s", "now", extra={"device": 0})
    get_logger("own").debug("not at this level")
    own, foreign = map(json.loads, capsys.readouterr().err.splitlines())
    assert (own["event"], own["loss"], own["stage"], own["job_id"], own["level"]) == (
        "step",
        0.5,
        "train",
        "j1",
        "info",
    )
    assert own["timestamp"].endswith("Z")
    assert (foreign["event"], foreign["device"], foreign["service"]) == ("careful now", 0, "quantizer")
    assert "pipeline_id" not in own


def test_traceback_is_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    try:
        raise KeyError("weights")
    except KeyError:
        get_logger().exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'weights'" in json.loads(line)["exception"]


def test_console_format(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("console")
    get_logger().info("ready", port=1)
    assert "ready" in capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_tracebacks_do_not_show_local_variables(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format)  # type: ignore[arg-type]

    def fails(token: str) -> None:
        raise KeyError("weights")

    try:
        fails("granq_" + "secret"[::-1])
    except KeyError:
        get_logger().exception("failed")
    shown = capsys.readouterr().err
    assert "weights" in shown
    assert "terces" not in shown
