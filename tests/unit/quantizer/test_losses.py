import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.quantizer.config import GeneratorLosses
from services.quantizer.losses import entropy, generator_loss, margin_loss, student_loss


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def test_losses_and_gradients_equal_the_published_functions(shared_data: Path) -> None:
    vectors = np.load(shared_data / "granq_vectors.npz")
    for case in range(4):
        value = {key: torch.from_numpy(np.asarray(vectors[f"loss{case}_{key}"])) for key in ("T", "S", "y")}
        want = {
            key: torch.from_numpy(np.asarray(vectors[f"loss{case}_{key}"]))
            for key in ("L_h", "ce_ds", "ce_as", "L_S", "dLG_dT", "dLG_dS", "dLS_dS")
        }
        teacher, student = value["T"].requires_grad_(), value["S"].requires_grad_()
        loss = generator_loss(teacher, student, value["y"], GeneratorLosses())
        by_teacher, by_student = torch.autograd.grad(loss, (teacher, student))
        assert relative(loss.detach(), want["L_h"] + 0.2 * want["ce_ds"] + 0.1 * want["ce_as"]) < 1e-5
        assert relative(by_teacher, want["dLG_dT"]) < 1e-5
        assert relative(by_student, want["dLG_dS"]) < 1e-5
        loss = student_loss(teacher.detach(), student, 20.0)
        assert relative(loss.detach(), want["L_S"]) < 1e-5
        assert relative(torch.autograd.grad(loss, student)[0], want["dLS_dS"]) < 2e-5


def loop(teacher: list[list[float]], student: list[list[float]], labels: list[int], c: GeneratorLosses) -> float:
    """Return the generator's loss by plain Python in double precision."""
    entropies: list[float] = []
    disagreement, agreement = 0.0, 0.0
    for t, s, y in zip(teacher, student, labels, strict=True):
        for sign in (-1, 1):
            logits = [a + sign * b for a, b in zip(t, s, strict=True)]
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(v - top) for v in logits))
            if sign < 0:
                entropies.append(-sum(math.exp(v - log_sum) * (v - log_sum) for v in logits))
                disagreement += (log_sum - logits[y]) / len(labels)
            else:
                agreement += (log_sum - logits[y]) / len(labels)
    low = min(entropies)
    span = max(math.log(len(teacher[0])) - low, float(np.finfo(np.float32).eps))
    margin = sum(
        max(0.0, c.lambda_lower - (h - low) / span) + max(0.0, (h - low) / span - c.lambda_upper) for h in entropies
    )
    return margin / len(labels) + c.beta * (c.alpha_disagreement * disagreement + c.alpha_agreement * agreement)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(2, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 10.0]))
def test_generator_loss_equals_a_loop(batch: int, classes: int, seed: int, size: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(batch, classes, generator=rng, dtype=torch.float64) * size for _ in range(2))
    labels = torch.randint(0, classes, (batch,), generator=rng)
    config = GeneratorLosses(0.3, 0.2, 0.2, 0.7, 0.5)
    want = loop(teacher.tolist(), student.tolist(), labels.tolist(), config)
    assert float(generator_loss(teacher, student, labels, config)) == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_student_loss_is_least_where_the_difference_is_constant() -> None:
    teacher = torch.randn(4, 10)
    best = student_loss(teacher, teacher + 3.0, 20.0)
    assert float(best) == pytest.approx(-400 * math.log(10), rel=1e-6)
    assert student_loss(teacher, torch.randn(4, 10), 20.0) > best


def test_margin_loss_of_a_batch_without_spread_is_finite() -> None:
    same = torch.zeros(3, 5)
    loss = margin_loss(same, same, 0.1, 0.8)
    assert torch.isfinite(loss)
    assert torch.allclose(entropy(same), torch.full((3,), math.log(5)))
