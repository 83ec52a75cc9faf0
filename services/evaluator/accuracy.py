"""Classification quality, summed batch by batch in float64."""

import math

import numpy as np
from numpy.typing import NDArray

from granq.v1 import reports_pb2


class AccuracyMeter:
    """Sums what reports_pb2.Accuracy needs, in memory that does not grow with the set.

    Equal logits are ranked by class number, lowest first, as an arg-max ranks them.

    Example:
        >>> meter = AccuracyMeter()
        >>> meter.update(np.array([[1.0, 2.0], [3.0, 0.0]]), labels=np.array([1, 1]))
        >>> meter.result().top1
        50.0
    """

    def __init__(self) -> None:
        self._images = 0
        self._classes = 0
        self._labelled = self._referenced = False
        self._top1 = self._top5 = self._agreeing = 0
        self._divergence = self._signal = self._noise = 0.0

    def update(
        self,
        logits: NDArray[np.floating],
        labels: NDArray[np.int64] | None = None,
        reference: NDArray[np.floating] | None = None,
    ) -> None:
        """Add one batch; all batches must give the same kinds of arguments.

        Args:
            logits: N×K, finite.
            labels: N true classes, 0 to K − 1.
            reference: N×K logits of the model that the graph should equal.
        """
        scores = logits.astype(np.float64)
        self._images += len(scores)
        self._classes = scores.shape[1]
        if labels is not None:
            self._labelled = True
            own = np.take_along_axis(scores, labels[:, np.newaxis], axis=1)
            before = np.arange(scores.shape[1]) < labels[:, np.newaxis]
            rank = ((scores > own) | ((scores == own) & before)).sum(axis=1)
            self._top1 += int((rank < 1).sum())
            self._top5 += int((rank < 5).sum())
        if reference is not None:
            self._referenced = True
            wanted = reference.astype(np.float64)
            self._agreeing += int((scores.argmax(axis=1) == wanted.argmax(axis=1)).sum())
            log_p, log_q = _log_softmax(wanted), _log_softmax(scores)
            self._divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
            self._signal += float(np.square(wanted).sum())
            self._noise += float(np.square(wanted - scores).sum())

    @property
    def top1(self) -> float:
        """Top-1 accuracy so far in percent; 0 before the first image."""
        return 100.0 * self._top1 / max(self._images, 1)

    def result(self) -> reports_pb2.Accuracy:
        """Return the figures of all batches; sqnr_db is infinite where the logits equal the reference's exactly."""
        result = reports_pb2.Accuracy(images=self._images)
        if not self._images:
            return result
        if self._labelled:
            result.top1 = self.top1
            if self._classes >= 6:
                result.top5 = 100.0 * self._top5 / self._images
        if self._referenced:
            result.agreement = 100.0 * self._agreeing / self._images
            # Rounding can leave a divergence of equal distributions a hair below its true value, 0.
            result.kl_divergence = max(self._divergence / self._images, 0.0)
            if self._signal > 0:
                ratio = self._signal / self._noise if self._noise > 0 else math.inf
                result.sqnr_db = 10.0 * math.log10(ratio)
        return result


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
