"""Calls of the database from the event loop, and what they do while it is away."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError

from services.common.errors import UnavailableError
from services.common.logs import get_logger
from services.coordinator.threads import Threads

_P = ParamSpec("_P")
_T = TypeVar("_T")
_AWAY = (OperationalError, InterfaceError)
_FIRST_DELAY = 0.2
_LAST_DELAY = 5.0

log = get_logger(__name__)


class DatabaseCalls:
    """Runs calls of the database in threads.

    Args:
        threads: The threads.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    async def call(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Return what the function returns; for those who can tell a user to try again.

        Raises:
            UnavailableError: The database does not answer.
        """
        try:
            return await self._threads.call(function, *arguments, **named)
        except _AWAY as error:
            log.warning("the database does not answer", error=str(error.orig))
            raise UnavailableError(
                "the database does not answer now; try again", reason="DATABASE_UNAVAILABLE"
            ) from error

    async def insist(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Return what the function returns, trying again until the database answers; for work that goes on by itself.

        The function must bear being repeated after a commit whose answer was lost.
        """
        delay = _FIRST_DELAY
        while True:
            try:
                return await self._threads.call(function, *arguments, **named)
            except _AWAY as error:
                if delay == _FIRST_DELAY:
                    log.warning("the database does not answer; trying again", error=str(error.orig))
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LAST_DELAY)
