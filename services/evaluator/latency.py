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
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < repeats and (not times or time.perf_counter() < end):
        check()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000.0
