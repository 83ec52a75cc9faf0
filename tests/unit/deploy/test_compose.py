"""The Compose file runs the images that there are, with settings that there are, and opens one port on loopback."""

from typing import Any

import yaml

from tests.support.deployment import DEPLOY, PROJECT, SERVERS, SERVICES, settings_variables


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]
    return found


def test_the_four_services_run_their_images() -> None:
    assert set(services()) == set(SERVICES)
    for name, service in services().items():
        assert service["image"] == f"granq-{name}:{PROJECT['version']}"
        assert service["build"]["target"] in SERVERS.stages
        assert (DEPLOY / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_settings_are_real_and_lead_to_services() -> None:
    known = {variable: name for name in SERVICES for variable in settings_variables(name)}
    for service in services().values():
        assert set(service["environment"]) <= set(known)
        for variable, value in service["environment"].items():
            if variable.endswith("_ADDRESS"):
                assert value.partition(":")[0] in services()


def test_containers_may_do_nothing_that_they_need_not() -> None:
    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        grace = float(service["environment"]["GRANQ_GRACE_SECONDS"])
        assert float(service["stop_grace_period"].removesuffix("s")) > grace


def test_only_the_coordinator_is_reached_and_from_this_machine_alone() -> None:
    ports = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert ports == {"coordinator": ["127.0.0.1:50050:50050"]}
