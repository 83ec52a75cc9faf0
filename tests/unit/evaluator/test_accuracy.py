import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.evaluator.accuracy import AccuracyMeter


def measured(logits: np.ndarray, batch: int, **arrays: np.ndarray) -> AccuracyMeter:
    meter = AccuracyMeter()
    for i in range(0, len(logits), batch):
        meter.update(logits[i : i + batch], **{name: a[i : i + batch] for name, a in arrays.items()})
    return meter


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_equals_a_loop_over_images(images: int, classes: int, batch: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few distinct values, so that ties are common.
    logits = random.integers(-3, 4, (images, classes)).astype(np.float32)
    reference = random.normal(0, 3, (images, classes)).astype(np.float32)
    labels = random.integers(0, classes, images)
    result = measured(logits, batch, labels=labels, reference=reference).result()
    top1 = top5 = agreeing = 0
    divergence = signal = noise = 0.0
    for row, wanted, label in zip(logits.tolist(), reference.tolist(), labels.tolist(), strict=True):
        order = sorted(range(classes), key=lambda k: (-row[k], k))
        top1 += order[0] == label
        top5 += label in order[:5]
        agreeing += order[0] == max(range(classes), key=lambda k: wanted[k])
        p = [math.exp(v) / sum(map(math.exp, wanted)) for v in wanted]
        q = [math.exp(v) / sum(map(math.exp, row)) for v in row]
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        signal += sum(v * v for v in wanted)
        noise += sum((v - w) ** 2 for v, w in zip(wanted, row, strict=True))
    assert result.images == images
    assert result.top1 == pytest.approx(100 * top1 / images)
    assert result.HasField("top5") == (classes >= 6)
    if classes >= 6:
        assert result.top5 == pytest.approx(100 * top5 / images)
    assert result.agreement == pytest.approx(100 * agreeing / images)
    assert result.kl_divergence == pytest.approx(divergence / images, abs=1e-9)
    assert result.sqnr_db == pytest.approx(10 * math.log10(signal / noise))


def test_what_is_not_given_stays_unset() -> None:
    logits = np.array([[1.0, 2.0]])
    only_labels = measured(logits, 1, labels=np.array([1])).result()
    assert only_labels.top1 == 100.0
    assert not any(only_labels.HasField(f) for f in ("top5", "agreement", "kl_divergence", "sqnr_db"))
    only_reference = measured(logits, 1, reference=logits).result()
    assert not only_reference.HasField("top1")
    assert (only_reference.agreement, only_reference.kl_divergence, only_reference.sqnr_db) == (100.0, 0.0, math.inf)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[1e30, -1e30], [-3e38, 3e38]], np.float32)
    result = measured(logits, 1, reference=np.array([[0.0, 1.0], [0.0, 1.0]])).result()
    assert math.isfinite(result.kl_divergence)
    assert result.agreement == 50.0
    assert math.isfinite(result.sqnr_db)


def test_small_noise_is_not_lost_in_large_sums() -> None:
    reference = np.full((20000, 6), 1000.0, np.float32)
    logits = reference.copy()
    logits[:, 0] += np.float32(0.125)
    result = measured(logits, 512, reference=reference).result()
    assert result.sqnr_db == pytest.approx(10 * math.log10(6e6 / 0.125**2), abs=1e-9)
