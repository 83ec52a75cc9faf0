import pytest

from services.common.errors import CancelledError
from services.evaluator import latency


class Clock:
    """Stands for the clock; runs take the given times."""

    def __init__(self, seconds: list[float]) -> None:
        self.now = 0.0
        self.left = seconds

    def perf_counter(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.left.pop(0)


@pytest.mark.parametrize(
    ("times", "repeats", "seconds", "median"),
    [
        ([0.1, 0.3, 0.2], 3, 100, 200.0),
        ([0.1, 0.9, 0.2, 0.3], 4, 100, 250.0),
        ([0.4, 0.4, 0.2, 0.1], 9, 0.5, 400.0),
        ([7.0], 9, 0.5, 7000.0),
    ],
)
def test_median_of_what_the_time_allows(
    monkeypatch: pytest.MonkeyPatch, times: list[float], repeats: int, seconds: float, median: float
) -> None:
    clock = Clock([50.0] * latency.WARM_UP + times)
    monkeypatch.setattr(latency, "time", clock)
    assert latency.median_milliseconds(clock.run, repeats, seconds) == pytest.approx(median)


def test_check_stops_it() -> None:
    def check() -> None:
        raise CancelledError("stop")

    with pytest.raises(CancelledError):
        latency.median_milliseconds(lambda: pytest.fail("ran"), 5, 1.0, check)
