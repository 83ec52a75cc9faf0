"""The soak's judge lets noise pass and sees growth."""

import random

import pytest

from tests.support.growth import MIB, Samples


def judged(name: str, values: list[float]) -> bool:
    samples = Samples()
    for value in values:
        samples.add(name, value)
    (verdict,) = samples.verdicts()
    return verdict.grew


def test_noise_and_a_warm_up_are_no_growth() -> None:
    noise = random.Random(1)
    warm_up = [(50 + 5 * step) * MIB for step in range(20)]
    assert not judged("pod: resident memory", warm_up + [(150 + noise.uniform(-8, 8)) * MIB for _ in range(60)])
    assert not judged("pod: file descriptors", [20 + noise.randint(0, 4) for _ in range(60)])
    assert not judged("store, pipelines: rows", [100 + 40 * (step % 7) for step in range(70)])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("pod: resident memory", [(100 + step) * MIB for step in range(60)]),
        ("pod: file descriptors", [20 + step / 2 for step in range(60)]),
        ("pod: threads", [8 + step / 4 for step in range(60)]),
        ("store, pipelines: rows", [10.0 * step for step in range(60)]),
    ],
)
def test_growth_is_seen(name: str, values: list[float]) -> None:
    assert judged(name, values)


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="too few"):
        judged("pod: threads", [1.0] * 8)


def test_buffers_that_come_and_go_are_no_growth_of_memory_and_what_grows_below_them_is() -> None:
    buffers = [0.0, 4.0, 12.0, 0.0, 8.0, 4.0] * 10
    assert not judged("a: resident memory", [(140 + each) * MIB for each in [0.0] * 30 + buffers])
    leak = [140 * MIB + each * MIB + MIB * count for count, each in enumerate([0.0] * 30 + buffers)]
    assert judged("a: resident memory", leak)
