"""Token buckets and places for calls, on a clock of the test's own."""

from contextlib import ExitStack

import pytest

from services.common.errors import ResourceExhaustedError
from services.common.principal import ANONYMOUS, Principal, Scope
from services.common.rpc import limits
from services.common.rpc.limits import CallLimits, Rates
from services.common.security import SecuritySettings

ALICE, BOB = (Principal(name, frozenset({Scope.READ})) for name in ("alice", "bob"))
SERVICE = Principal("coordinator", frozenset({Scope.SERVICE}))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_a_steady_rate() -> None:
    clock = Clock()
    rates = Rates(per_second=2.0, burst=3, clock=clock)
    assert [rates.take("alice") for _ in range(3)] == [0, 0, 0]
    assert rates.take("alice") == pytest.approx(0.5)
    assert rates.take("bob") == 0, "one principal's calls are not another's"
    clock.now += 0.5
    assert rates.take("alice") == 0
    assert rates.take("alice") > 0
    clock.now += 3600
    assert [rates.take("alice") > 0 for _ in range(4)] == [False, False, False, True]


def test_refused_calls_cost_nothing() -> None:
    clock = Clock()
    rates = Rates(per_second=1.0, burst=1, clock=clock)
    for _ in range(100):
        rates.take("alice")
    clock.now += 1
    assert rates.take("alice") == 0


def test_memory_is_bounded_and_the_latest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MAX_BUCKETS", 10)
    rates = Rates(per_second=1.0, burst=1, clock=Clock())
    for number in range(1000):
        rates.take(f"p{number}")
    assert len(rates) == 10
    assert rates.take("p999") > 0
    assert rates.take("p0") == 0


def test_places_of_all_and_of_one() -> None:
    calls = CallLimits(SecuritySettings(max_concurrent_rpcs=3, max_principal_rpcs=2))
    with ExitStack() as stack:
        stack.enter_context(calls.taken(ALICE))
        with calls.taken(ALICE), pytest.raises(ResourceExhaustedError, match="2 of your calls"), calls.taken(ALICE):
            pass
        stack.enter_context(calls.taken(ALICE))
        stack.enter_context(calls.taken(BOB))
        with pytest.raises(ResourceExhaustedError, match="serves 3 calls") as caught, calls.taken(SERVICE):
            pass
        assert caught.value.reason == "TOO_MANY_CALLS"
    with calls.taken(ALICE), calls.taken(ALICE), calls.taken(BOB):
        pass


@pytest.mark.parametrize("principal", [SERVICE, ANONYMOUS], ids=["service", "anonymous"])
def test_services_and_the_unasked_share_all_places(principal: Principal) -> None:
    calls = CallLimits(SecuritySettings(max_principal_rpcs=1, principal_rpc_burst=1, principal_rpcs_per_second=0.001))
    for _ in range(5):
        with calls.taken(principal), calls.taken(principal):
            pass


def test_who_calls_too_often_is_told_when_to_come_back() -> None:
    calls = CallLimits(SecuritySettings(principal_rpc_burst=1, principal_rpcs_per_second=0.1))
    with calls.taken(ALICE):
        pass
    with pytest.raises(ResourceExhaustedError, match=r"again in (9|10)\.") as caught, calls.taken(ALICE):
        pass
    assert caught.value.reason == "RATE_LIMIT_EXCEEDED"
