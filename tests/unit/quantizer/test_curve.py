"""Loss curves: few points, and the same ones after a resumption."""

import torch

from services.quantizer.curve import POINTS, LossCurve


def fill(curve: LossCurve, first: int, last: int) -> LossCurve:
    for iteration in range(first, last + 1):
        curve.add(iteration, torch.tensor([float(iteration), -1.0]))
    return curve


def test_a_short_training_keeps_every_iteration() -> None:
    assert fill(LossCurve(3), 1, 3).points() == [(1, 1.0, -1.0), (2, 2.0, -1.0), (3, 3.0, -1.0)]
    assert LossCurve(0).points() == []


def test_a_long_training_keeps_means_of_equal_stretches() -> None:
    curve = fill(LossCurve(2 * POINTS + 1), 1, 2 * POINTS + 1)
    points = curve.points()
    assert (curve.every, len(points)) == (3, 667)
    assert points[0] == (3, 2.0, -1.0)
    assert points[-1] == (2001, 2000.0, -1.0)


def test_what_is_not_done_yet_has_no_point() -> None:
    assert [point[0] for point in fill(LossCurve(10), 1, 4).points()] == [1, 2, 3, 4]


def test_a_resumed_curve_is_that_of_an_undisturbed_training() -> None:
    whole = fill(LossCurve(2500), 1, 2500)
    resumed = LossCurve(2500)
    resumed.load_state(fill(LossCurve(2500), 1, 1000).state())
    assert fill(resumed, 1001, 2500).points() == whole.points()
