"""Losses between teacher logits T and student logits S, both N×K float32 (AdaDFQ, CVPR 2023; GranQ section 4).

``generator_loss`` shapes the images: it wants samples on which teacher and student neither fully agree nor fully
disagree. ``student_loss`` trains the student. The BatchNorm term of the generator's loss needs the teacher's
activations and lives in the generator service.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from services.quantizer.config import GeneratorLosses


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits) for each row, N."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def margin_loss(teacher: Tensor, student: Tensor, lower: float, upper: float) -> Tensor:
    """Return L_h: by how much the normalized entropy of the difference leaves [lower, upper], a scalar.

    h = entropy(softmax(T − S)) is normalized between its minimum in the batch and ln K; when the batch has no spread
    the denominator would vanish, and is kept at float32's smallest normal step instead.
    """
    h = entropy(teacher - student)
    low = h.min()
    span = (math.log(teacher.shape[1]) - low).clamp_min(torch.finfo(h.dtype).eps)
    normalized = (h - low) / span
    return F.relu(lower - normalized).mean() + F.relu(normalized - upper).mean()


def generator_loss(teacher: Tensor, student: Tensor, labels: Tensor, config: GeneratorLosses) -> Tensor:
    """Return L_h + β·(α_ds·CE(T − S, y) + α_as·CE(T + S, y)), a scalar; labels are int64 N."""
    classes = config.alpha_disagreement * F.cross_entropy(teacher - student, labels)
    classes = classes + config.alpha_agreement * F.cross_entropy(teacher + student, labels)
    return margin_loss(teacher, student, config.lambda_lower, config.lambda_upper) + config.beta * classes


def student_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return L_S = −τ²·mean entropy(softmax((T − S)/τ)), a scalar; least when T − S is constant in every row."""
    return -(temperature**2) * entropy((teacher - student) / temperature).mean()
