"""Quantization-aware training: one loop for both families of students and both sources of images.

An iteration runs the student once. Its logits give both gradients that are needed, the one of the generator's loss by
the images and the one of the student's loss by the parameters (the published way runs the student twice):

    S = student(x)
    g_x, g_T = ∂(L_h + β·L_cls)/∂x, ∂T    sent to the generator, which takes its step meanwhile
    ∂(L_S + λ·L_F)/∂parameters             the student's own step; left out during warm-up; L_F: ``features.py``

This is the same arithmetic as the published sequence, because the generator's step leaves the student as it is.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from services.common.kernels.blocks import fuse_blocks
from services.quantizer.batches import Batch, BatchSource
from services.quantizer.config import ActivationGranularity, GeneratorLosses, Training
from services.quantizer.curve import LossCurve
from services.quantizer.fake_quant import DynamicActivation
from services.quantizer.features import FeatureLoss
from services.quantizer.flat_areas import FlatAreas
from services.quantizer.losses import generator_loss, student_loss
from services.quantizer.optimizers import load_optimizer, optimizer_for, optimizer_tensors
from services.quantizer.ranks import Ranks
from services.quantizer.student import stop_tracking


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        iteration: Number of finished ones.
        student: Mean of the student's loss since the last report.
        generator: Mean of the generator's loss since the last report.
        iterations_per_second: Speed since the last report.
        agreement: Share of the latest batch, 0 to 1, for which student and teacher name the same class.
    """

    iteration: int
    student: float
    generator: float
    iterations_per_second: float
    agreement: float


class Trainer:
    """Trains a student in place; its state can be taken and restored at any iteration boundary, bit for bit.

    Args:
        student: From ``build_student``, its ranges set.
        training: The schedule.
        losses: Of the generator, when the source wants gradients.
        source: Of the images.
        teacher: Frozen copy of the float model on the student's device, whose features the student is to follow with
            the weight ``training.feature_weight``; None without feature distillation.
        flat: Gives images flat areas, about which the teacher is then asked; None leaves them as they are.
        bfloat16: Whether the student's layers compute in bfloat16; its weights, their gradients and losses never do.

    Raises:
        ValueError: flat areas without a teacher, or for a generator, whose gradients belong to its own images.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        training: Training,
        losses: GeneratorLosses,
        source: BatchSource,
        teacher: fx.GraphModule | None = None,
        flat: FlatAreas | None = None,
        bfloat16: bool = False,
    ) -> None:
        if flat is not None and (teacher is None or source.wants_gradients):
            raise ValueError("flat areas need a teacher, and a source that wants no gradients")
        self.student = student
        self._bfloat16 = bfloat16
        self.training = training
        self.losses = losses
        self.source = source
        self.iteration = 0
        self._ranks = Ranks()
        self.curve = LossCurve(training.iterations)
        self._epoch = torch.zeros(2, dtype=torch.float64)  # sum and count of L_S in the last epoch
        self._optimizer = optimizer_for(student, training)
        self._run = fuse_blocks(student, _own_bits)
        self._teacher = teacher
        self._flat = flat
        self._latest: tuple[Tensor, Tensor] | None = None
        self._features = FeatureLoss(teacher, student) if teacher is not None else None

    def join(self, ranks: Ranks) -> None:
        """Train as one of ``ranks`` from now on; all of them must be in the same state."""
        self._ranks = ranks
        for module in self.student.modules():
            if isinstance(module, DynamicActivation):
                module.agree = ranks.extremes

    def rate(self, iteration: int) -> float:
        """Return the factor on the learning rates at ``iteration``, 0 to 1."""
        if self.training.cosine:
            begin = self.training.warmup_iterations
            span = max(1, self.training.iterations - begin)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, iteration - begin) / span)))
        epoch = iteration // self.training.iterations_per_epoch
        return float(0.1 ** sum(epoch >= m for m in self.training.milestones))

    def step(self) -> tuple[Tensor, Tensor]:
        """Do one iteration; return (L_S, L_h + β·L_cls) as detached scalars, the latter 0 without a generator.

        L_S is given above its least value −τ²·ln K, which a student without error reaches.
        """
        if self.iteration == self.training.warmup_iterations:
            stop_tracking(self.student)
        batch = self._ranks.share(self._draw)
        learns = self.iteration >= self.training.warmup_iterations
        count = len(batch.images)
        part = self._ranks.part(count)
        images = batch.images[part].requires_grad_(self.source.wants_gradients)
        logits = batch.logits[part].detach()
        if self._teacher is not None and learns:
            with torch.no_grad():
                logits = self._teacher(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bfloat16):
            student = self._run(images).float()
        self._latest = student.detach(), logits
        generator = torch.zeros(())
        if self.source.wants_gradients:
            # Of the whole batch, in whose least entropy the loss takes its measure.
            teacher = batch.logits.detach().requires_grad_()
            leaf = self._ranks.gather(student.detach(), count).requires_grad_()
            generator = generator_loss(teacher, leaf, batch.labels, self.losses)
            by_teacher, by_student = torch.autograd.grad(generator, (teacher, leaf))
            (by_images,) = torch.autograd.grad(student, images, by_student[part], retain_graph=learns)
            self.source.answer(self.iteration, self._ranks.gather(by_images, count), by_teacher)
        share = len(student) / count
        loss = student_loss(logits, student, self.training.temperature) * share
        if learns:
            weight = self.training.feature_weight or 0.0
            self._learn(loss if self._features is None else loss + weight * share * self._features())
        loss = loss.detach().clone()
        self._ranks.add_up([loss])
        self.iteration += 1
        least = -(self.training.temperature**2) * math.log(student.shape[1])
        return loss - least, generator.detach()

    def _draw(self) -> Batch:
        batch = self.source.next(self.iteration)
        if self._flat is None:
            return batch
        return replace(batch, images=self._flat(batch.images, self.iteration))

    def _learn(self, loss: Tensor) -> None:
        factor = self.rate(self.iteration)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._optimizer.zero_grad()
        parameters: list[Tensor] = [p for group in self._optimizer.param_groups for p in group["params"]]
        loss.backward(inputs=parameters)
        self._ranks.add_up([p.grad for p in parameters if p.grad is not None])
        self._optimizer.step()

    def _agreement(self) -> float:
        # Worked out for a report only, so that an iteration pays nothing for it.
        if self._latest is None:
            return 0.0
        student, teacher = self._latest
        return float((student.argmax(1) == teacher.argmax(1)).float().mean())

    @property
    def last_epoch_loss(self) -> float:
        """Mean of L_S over the last epoch so far; NaN before it."""
        return float(self._epoch[0] / self._epoch[1])

    def run(self, report: Callable[[Progress], None]) -> Iterator[int]:
        """Train to the end, yielding the number of finished iterations after each, so that the caller can save or stop.

        Raises:
            FloatingPointError: the loss became NaN or infinite.
        """
        epoch = self.training.iterations_per_epoch
        sums, count, since = torch.zeros(2), 0, time.monotonic()
        while self.iteration < self.training.iterations:
            losses = torch.stack([value.cpu() for value in self.step()])
            if not torch.isfinite(losses).all():
                raise FloatingPointError(
                    f"loss {losses.tolist()} at iteration {self.iteration}; lower the learning rate"
                )
            self.curve.add(self.iteration, losses)
            sums, count = sums + losses, count + 1
            if self.iteration > self.training.iterations - epoch:
                self._epoch += torch.stack([losses[0].double(), torch.ones((), dtype=torch.float64)])
            now = time.monotonic()
            if now - since >= 0.5 or self.iteration == self.training.iterations:
                mean = (sums / count).tolist()
                speed = count / max(now - since, 1e-9)
                report(Progress(self.iteration, mean[0], mean[1], speed, self._agreement()))
                sums, count, since = torch.zeros(2), 0, now
            yield self.iteration

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next iteration depends on, apart from the source's, by name."""
        tensors = {f"student.{name}": value.detach() for name, value in self.student.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self._optimizer).items()}
        return tensors | {"epoch": self._epoch.clone(), "curve": self.curve.state()}

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Go back to a state that ``state`` returned after ``iteration`` finished iterations."""
        self.student.load_state_dict(_under(tensors, "student."))
        load_optimizer(self._optimizer, _under(tensors, "optimizer."))
        self._epoch = tensors["epoch"].clone()
        self.curve.load_state(tensors["curve"])
        self.iteration = iteration
        if iteration > self.training.warmup_iterations:
            stop_tracking(self.student)


def _own_bits(module: nn.Module) -> int | None:
    if isinstance(module, DynamicActivation) and module.granularity is ActivationGranularity.PER_SAMPLE_CHANNEL:
        return module.bits
    return None


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
