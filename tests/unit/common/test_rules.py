"""The table of scopes names every RPC of the contract, and no other."""

from importlib import import_module
from pathlib import Path

import pytest

from services.common.principal import ANONYMOUS, Principal, Scope
from services.common.rpc.rules import RULES, UNLISTED, rule_of

ROOT = Path(__file__).resolve().parents[3]
NAMES = sorted(path.stem for path in (ROOT / "protos" / "granq" / "v1").glob("*.proto"))
# gRPC's own services, which every server has beside those of the contract.
STANDARD = ("grpc_health.v1.health_pb2", "grpc_reflection.v1alpha.reflection_pb2")


def methods() -> set[str]:
    modules = [import_module(f"granq.v1.{name}_pb2") for name in NAMES] + [import_module(name) for name in STANDARD]
    return {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_every_rpc_has_a_rule_and_every_rule_an_rpc() -> None:
    assert methods() == set(RULES)


def test_what_users_and_services_may_call() -> None:
    scopes = {method: rule.scope for method, rule in RULES.items()}
    open_to_all = {method for method, scope in scopes.items() if scope is None}
    assert open_to_all == {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"}
    for method, scope in scopes.items():
        of_users = method.startswith(("/granq.v1.PipelineService/", "/granq.v1.ArtifactService/"))
        if of_users:
            assert scope in (Scope.READ, Scope.SUBMIT), method
        elif method == "/granq.v1.DeviceService/ListDevices":
            assert scope is Scope.READ
        elif method == "/granq.v1.DeviceService/RemoveDevice":
            assert scope is Scope.ADMIN
        elif method.startswith("/granq.v1."):
            assert scope is Scope.SERVICE, method


def test_what_changes_something_is_audited_and_needs_more_than_reading() -> None:
    reads = ("Get", "List", "Watch", "Download", "Check", "SendHeartbeat", "ServerReflectionInfo")
    for method, rule in RULES.items():
        assert rule.mutates is not method.rpartition("/")[2].startswith(reads), method
        assert not (rule.mutates and rule.scope in (None, Scope.READ)), method


def test_a_method_without_a_rule_is_for_administrators() -> None:
    assert rule_of("/granq.v1.PipelineService/NotThere") is UNLISTED
    assert UNLISTED.scope is Scope.ADMIN


@pytest.mark.parametrize("scope", list(Scope))
def test_scopes_do_not_include_each_other_but_admin_includes_all(scope: Scope) -> None:
    assert [s for s in Scope if Principal("a", frozenset({scope})).may(s)] == (
        list(Scope) if scope is Scope.ADMIN else [scope]
    )


def test_only_administrators_see_what_others_own() -> None:
    assert Principal("alice", frozenset({Scope.READ, Scope.SUBMIT})).only_owner == "alice"
    assert Principal("root", frozenset({Scope.ADMIN})).only_owner is None
    assert ANONYMOUS.only_owner is None
