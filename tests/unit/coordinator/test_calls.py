"""Calls of a database that is away for a while."""

import pytest
from sqlalchemy.exc import OperationalError

from services.common.errors import UnavailableError
from services.coordinator.calls import DatabaseCalls
from services.coordinator.threads import Threads


class Flaky:
    """A function that fails some times before it answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def __call__(self, answer: int) -> int:
        if self.failures:
            self.failures -= 1
            raise OperationalError("SELECT 1", {}, ConnectionError("gone"))
        return answer


async def test_users_are_told_to_try_again(threads: Threads) -> None:
    with pytest.raises(UnavailableError) as told:
        await DatabaseCalls(threads).call(Flaky(1), 7)
    assert told.value.reason == "DATABASE_UNAVAILABLE"
    assert "SELECT" not in told.value.message


async def test_work_goes_on_when_the_database_is_back(threads: Threads) -> None:
    assert await DatabaseCalls(threads).insist(Flaky(2), 7) == 7


async def test_other_errors_are_not_repeated(threads: Threads) -> None:
    def broken() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await DatabaseCalls(threads).insist(broken)
