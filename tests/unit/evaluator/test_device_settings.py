"""How an evaluator is told that it is a device."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.evaluator.server import create_server
from services.evaluator.settings import EvaluatorSettings


def test_targets_and_labels_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANQ_DEVICE_TARGETS", "jetson-orin-nano, jetson-orin-nx")
    monkeypatch.setenv("GRANQ_DEVICE_LABELS", "plant=graz, line=4=b")
    settings = EvaluatorSettings()
    assert settings.device_targets == ("jetson-orin-nano", "jetson-orin-nx")
    assert settings.device_labels == {"plant": "graz", "line": "4=b"}
    # Jobs' processes get the settings so.
    assert EvaluatorSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dial_out": True}, "dial_out needs coordinator_address"),
        ({"coordinator_address": "pool:50050", "host": "0.0.0.0"}, "give device_address, or set dial_out"),
        ({"coordinator_address": "pool"}, "coordinator_address"),
        ({"device_id": "Jetson 7"}, "device_id"),
        ({"device_labels": "plant"}, "labels are key=value"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluatorSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "url"),
    [({}, "granq://pool:50050"), ({"artifact_url": "memory://device-settings"}, "memory://device-settings")],
)
async def test_a_device_that_dials_out_has_the_coordinators_store_unless_it_is_given_one(
    tmp_path: Path, given: dict[str, str], url: str
) -> None:
    settings = EvaluatorSettings(dial_out=True, coordinator_address="pool:50050", cache_dir=tmp_path, **given)  # type: ignore[arg-type]
    assert create_server(settings).settings.artifact_url == url
