"""The losses of a training over its iterations, at a bounded number of points."""

import torch
from torch import Tensor

POINTS = 1000


class LossCurve:
    """Means of L_S and L_h + β·L_cls over equal stretches of iterations, as many stretches as POINTS allow.

    Args:
        iterations: Of the whole training.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.every = max(1, -(-iterations // POINTS))
        # Sums of both losses, and how many were added.
        self._sums = torch.zeros(-(-iterations // self.every), 3, dtype=torch.float64)

    def add(self, iteration: int, losses: Tensor) -> None:
        """Take the two losses of an iteration, counted from 1."""
        stretch = self._sums[(iteration - 1) // self.every]
        stretch[:2] += losses.double()
        stretch[2] += 1

    def points(self) -> list[tuple[int, float, float]]:
        """Return (last iteration, mean L_S, mean of the generator's loss) for each stretch that is done."""
        found = []
        for index, (student, generator, count) in enumerate(self._sums.tolist()):
            if count:
                last = min((index + 1) * self.every, self.iterations)
                found.append((last, student / count, generator / count))
        return found

    def state(self) -> Tensor:
        """Return what ``load_state`` takes, float64."""
        return self._sums.clone()

    def load_state(self, sums: Tensor) -> None:
        """Go on from ``state``."""
        self._sums = sums.clone()
