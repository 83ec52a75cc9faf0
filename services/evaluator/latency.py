"""Time that one batch takes."""

import statistics
import time
from collections.abc import Callable

WARM_UP = 3


def median_milliseconds(
    run: Callable[[], object], repeats: int, seconds: float, check: Callable[[], None] = lambda: None
) -> float:
    """Return the median time of ``run`` in milliseconds.

    The median, unlike the mean, is not moved by the few runs that the system interrupts.

    Args:
        run: Runs one batch; called a few times before timing begins, for caches, allocations and clock speed.
        repeats: Timed runs at most, 1 or more.
        seconds: No further timed run begins after this time; one always does.
        check: Called between runs, outside of what is timed; may raise to stop.
    """
    for _ in range(WARM_UP):
        check()
        run()

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return statistics.median(timings(timed, repeats, seconds, check)) * 1000.0


def timings(timed: Callable[[], float], repeats: int, seconds: float, check: Callable[[], None]) -> list[float]:
    """Return what ``timed`` returns, run after run, 1 or more times.

    Args:
        timed: Runs once and returns its time.
        repeats: Runs at most, 1 or more.
        seconds: No further run begins after this time; one always does.
        check: Called before each run; may raise to stop.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < repeats and (not times or time.perf_counter() < end):
        check()
        times.append(timed())
    return times
