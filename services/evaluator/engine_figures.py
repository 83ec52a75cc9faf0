"""How fast an engine is at the batches of its profile, and how close to the graph that it was built from."""

import math
import statistics
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from granq.v1 import reports_pb2
from services.evaluator.engine_model import EngineModel
from services.evaluator.latency import WARM_UP, timings


def measure_batches(
    model: EngineModel,
    images: NDArray[np.float32],
    reference: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None,
    repeats: int,
    seconds: float,
    check: Callable[[], None],
) -> list[reports_pb2.BatchMeasurement]:
    """Measure an engine at its smallest, tuned-for and largest batch, each once.

    Args:
        model: The engine.
        images: Float32 N×C×H×W, repeated where a batch takes more.
        reference: Gives the logits of the graph; None leaves the comparison out.
        repeats: Timed runs of a batch at most, 1 or more.
        seconds: No further timed run of a batch begins after this time.
        check: Called between runs; may raise to stop.
    """
    results = []
    for size in sorted(set(model.batch)):
        batch = np.resize(images, (size, *images.shape[1:]))
        result = reports_pb2.BatchMeasurement(batch=size)
        if reference is not None:
            logits, expected = model.run(batch), reference(batch)
            result.agreement = 100.0 * float(np.mean(logits.argmax(1) == expected.argmax(1)))
            result.largest_difference = float(np.abs(logits - expected).max())
        model.load(batch)
        for _ in range(WARM_UP):
            check()
            model.gpu.milliseconds(model.enqueue)
        times = timings(lambda: model.gpu.milliseconds(model.enqueue), repeats, seconds, check)
        result.latency_ms_mean = statistics.fmean(times)
        result.latency_ms_p50 = statistics.median(times)
        result.latency_ms_p99 = sorted(times)[math.ceil(0.99 * len(times)) - 1]
        result.images_per_second = size * 1000.0 / result.latency_ms_mean
        results.append(result)
    return results
