"""Settings of the coordinator."""

import pytest
from pydantic import ValidationError

from services.coordinator.settings import CoordinatorSettings


def test_defaults_are_explicit_about_who_runs_what(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRANQ_EXECUTOR_ID", "GRANQ_APPLICATION_VERSION", "GRANQ_DATABASE_URL", "GRANQ_PORT"):
        monkeypatch.delenv(name, raising=False)
    settings = CoordinatorSettings()
    assert (settings.port, settings.metrics_port, settings.executor_id) == (50050, 51050, "coordinator")
    assert settings.application_version
    assert settings.database_url.startswith("sqlite:////")


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANQ_EXECUTOR_ID", "granq-coordinator-0")
    monkeypatch.setenv("GRANQ_DATABASE_URL", "postgresql://granq@db/granq")
    settings = CoordinatorSettings()
    assert settings.executor_id == "granq-coordinator-0"
    assert settings.database_url == "postgresql://granq@db/granq"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("database_url", "mysql://a/b", "only sqlite and postgresql"), ("max_crashes", 0, "max_crashes"), ("no", 1, "no")],
)
def test_wrong_values_are_told(name: str, value: object, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        CoordinatorSettings(**{name: value})  # type: ignore[arg-type]
