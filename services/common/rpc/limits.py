"""How much one server serves at once, and how much of it one principal may take."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.errors import ResourceExhaustedError
from services.common.principal import ANONYMOUS, Principal, Scope
from services.common.security import SecuritySettings

_MAX_BUCKETS = 4096


class Rates:
    """A token bucket for each of the latest principals; memory is bounded, the longest unseen is forgotten first.

    Args:
        per_second: Calls that flow into a bucket.
        burst: What it holds at most.
        clock: Seconds that only grow.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        # What was left, and when.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: str) -> float:
        """Take one call out of a bucket; return 0, or the seconds after which it will hold one again."""
        now = self._clock()
        left, then = self._buckets.pop(name, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._per_second)
        taken = left >= 1.0
        self._buckets[name] = (left - taken, now)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1.0 - left) / self._per_second


class CallLimits:
    """Counts the calls of one server.

    Services call each other as often as their work asks for, so what one principal may take does not bind them; nor
    does it bind callers who were not asked who they are, and so cannot be told apart.

    Args:
        settings: The limits.
    """

    def __init__(self, settings: SecuritySettings) -> None:
        self._settings = settings
        self._rates = Rates(settings.principal_rpcs_per_second, settings.principal_rpc_burst)
        self._of: Counter[str] = Counter()
        self._all = 0

    @contextmanager
    def taken(self, principal: Principal) -> Iterator[None]:
        """Hold a place for one call.

        Raises:
            ResourceExhaustedError: There is none left, or the principal calls too often.
        """
        settings, name = self._settings, principal.name
        if self._all >= settings.max_concurrent_rpcs:
            raise ResourceExhaustedError(
                f"this server serves {settings.max_concurrent_rpcs} calls already; try again later",
                reason="TOO_MANY_CALLS",
            )
        if principal is not ANONYMOUS and Scope.SERVICE not in principal.scopes:
            if self._of[name] >= settings.max_principal_rpcs:
                raise ResourceExhaustedError(
                    f"{settings.max_principal_rpcs} of your calls are being served already; end some first",
                    reason="TOO_MANY_CALLS",
                )
            wait = self._rates.take(name)
            if wait > 0:
                raise ResourceExhaustedError(
                    f"you call too often; try again in {wait:.2f} s", reason="RATE_LIMIT_EXCEEDED"
                )
        self._all += 1
        self._of[name] += 1
        try:
            yield
        finally:
            self._all -= 1
            self._of[name] -= 1
            if not self._of[name]:
                del self._of[name]
