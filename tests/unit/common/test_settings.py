"""Settings come from the environment, reject what they do not know, and cross to a child as JSON."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.common.settings import ServerSettings


class WorkerSettings(ServerSettings):
    port: int = 50051


def test_metrics_port_follows_port(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (WorkerSettings().port, WorkerSettings().metrics_port) == (50051, 51051)
    assert WorkerSettings(port=0).metrics_port == 0
    assert WorkerSettings(metrics_port=0).metrics_port == 0
    monkeypatch.setenv("GRANQ_PORT", "6000")
    assert WorkerSettings().metrics_port == 7000


def test_default_store_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ServerSettings().artifact_url == f"file://{tmp_path}/granq-data/artifacts"


@pytest.mark.parametrize(
    "values", [{"prot": 1}, {"port": 70000}, {"log_level": "LOUD"}, {"max_running_jobs": 0}, {"metrics_port": -2}]
)
def test_wrong_values_are_rejected_and_named(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        ServerSettings(**values)  # type: ignore[arg-type]


def test_json_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = WorkerSettings(port=1234).model_dump_json()
    monkeypatch.setenv("GRANQ_PORT", "6000")
    assert WorkerSettings.model_validate_json(text).port == 1234
