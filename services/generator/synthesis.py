"""Trains the generator against a frozen teacher, one step at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import fx, nn

from granq.v1 import common_pb2
from services.common.kernels.blocks import fuse_blocks
from services.generator.bn_statistics import BatchNormStatistics
from services.generator.networks import LATENT, ConditionalGenerator
from services.generator.refinement import refine
from services.generator.scenes import scenes

_BETAS: Final = (0.5, 0.999)


@dataclass(frozen=True)
class SynthesisParameters:
    """What a training of the generator depends on, beside the teacher.

    Attributes:
        batch_size: Images in a batch, at least 2.
        seed: Seed of the generator's weights and of its draws.
        learning_rate: Of Adam.
        beta: Weight of the classification loss.
        gamma: Weight of L_BNS.
        bounded: Whether images keep between black and white, where these are known.
    """

    batch_size: int
    seed: int = 0
    learning_rate: float = 1e-3
    beta: float = 1.0
    gamma: float = 1.0
    bounded: bool = True

    @classmethod
    def of(cls, config: common_pb2.GeneratorConfig, batch_size: int, seed: int) -> Self:
        """Return the parameters of a request, with the contract's defaults for what it leaves out."""
        names = ("learning_rate", "beta", "gamma", "bounded")
        given = {name: getattr(config, name) for name in names if config.HasField(name)}
        return cls(batch_size=batch_size, seed=seed, **given)


@dataclass(frozen=True)
class Batch:
    """Synthetic images and what the teacher says of them, detached from the graph.

    Attributes:
        iteration: Steps that the generator had made, from 0.
        images: float32 N×C×H×W.
        labels: Labels that they were made for, int64 N.
        logits: The teacher's, float32 N×K.
        bn_loss: L_BNS of this batch, unweighted.
    """

    iteration: int
    images: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor
    bn_loss: torch.Tensor


@dataclass
class _Pending:
    """A drawn batch with its graph, and the small state from before the draw."""

    images: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor
    bn_loss: torch.Tensor
    rng: torch.Tensor
    buffers: dict[str, torch.Tensor]


class Synthesizer:
    """A generator in training.

    Call :meth:`draw`, then :meth:`step` (gradients from outside) or :meth:`step_alone`, and so on. The same seed gives
    the same sequence on the same machine with the same number of threads, also over :meth:`state` and :meth:`restore`.

    Args:
        teacher: A classifier in eval mode; its parameters are frozen and it is moved to the device.
        input_shape: C×H×W of one image.
        num_classes: Number of the teacher's logits.
        parameters: Of the training.
        device: Where to compute.
        pixel_range: What black and white are, float32 C each, or None.
        bfloat16: Whether layers compute in bfloat16. Weights, their gradients, images, statistics and losses never do.
    """

    def __init__(
        self,
        teacher: nn.Module,
        input_shape: tuple[int, int, int],
        num_classes: int,
        parameters: SynthesisParameters,
        device: torch.device,
        pixel_range: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        bfloat16: bool = False,
    ) -> None:
        self.parameters = parameters
        self.input_shape = input_shape
        self.iteration = 0
        self._device = device
        self._bfloat16 = bfloat16
        self._pixel_range = pixel_range
        self.num_classes = num_classes
        self._teacher = teacher.eval().requires_grad_(False).to(device)
        self._teacher.to(memory_format=torch.channels_last)
        self._statistics = BatchNormStatistics(self._teacher)
        self._run = self._teacher
        if isinstance(self._teacher, fx.GraphModule):
            self._run = fuse_blocks(self._teacher, listener=self._statistics.add)
        # The weights are drawn on the CPU from the seed alone, without a trace in the process's own random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(parameters.seed)
            self.generator = ConditionalGenerator(input_shape, num_classes, pixel_range if parameters.bounded else None)
        self.generator.to(device).train()
        self._random = torch.Generator().manual_seed(parameters.seed)
        self._optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=parameters.learning_rate, betas=_BETAS, fused=True
        )
        self._pending: _Pending | None = None

    def draw(self, *, train: bool = True) -> Batch:
        """Draw noise and labels, and return the images with the teacher's logits.

        Args:
            train: Whether a step will follow; without, nothing is kept and no gradient is prepared.

        Raises:
            RuntimeError: The last batch still waits for its step.
        """
        if self._pending is not None:
            raise RuntimeError("the last batch has had no step yet")
        rng = self._random.get_state()
        buffers = {name: buffer.clone() for name, buffer in self.generator.named_buffers()}
        size = self.parameters.batch_size
        z = torch.randn(size, LATENT, generator=self._random).to(self._device)
        labels = torch.randint(self.num_classes, (size,), generator=self._random).to(self._device)
        with (
            torch.set_grad_enabled(train),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16),
        ):
            images = self.generator(z, labels)
            logits = self._run(images).float()
            bn_loss = self._statistics.take_loss()
        if train:
            self._pending = _Pending(images, labels, logits, bn_loss, rng, buffers)
        return Batch(self.iteration, images.detach(), labels, logits.detach(), bn_loss.detach())

    def draw_refined(self, count: int, steps: int, on_step: Callable[[], None] = lambda: None) -> Batch:
        """Draw procedural scenes and labels, and refine the scenes' pixels to what the teacher saw in training.

        No use of the generator, whatever its state (``scenes.py``, ``refinement.py``).

        Args:
            count: Images, 32 or more if their statistics are to mean something.
            steps: Of the refinement, 0 or more.
            on_step: Called before each step.

        Raises:
            RuntimeError: The last batch still waits for its step.
        """
        if self._pending is not None:
            raise RuntimeError("the last batch has had no step yet")
        images = scenes(count, self.input_shape, self._random)
        labels = torch.randint(self.num_classes, (count,), generator=self._random).to(self._device)
        pixel_range = self._pixel_range if self.parameters.bounded else None
        images = refine(self._run, self._statistics, images.to(self._device), labels, steps, pixel_range, on_step)
        with torch.no_grad():
            logits = self._run(images)
            bn_loss = self._statistics.take_loss()
        return Batch(self.iteration, images.contiguous(), labels, logits, bn_loss)

    def step(self, images_gradient: torch.Tensor, logits_gradient: torch.Tensor) -> None:
        """Step the generator with gradients of losses that were computed elsewhere, plus γ·L_BNS.

        Args:
            images_gradient: ∂L/∂images through whatever is not the teacher, N×C×H×W.
            logits_gradient: ∂L/∂T, N×K.
        """
        batch = self._take_pending()
        gamma = torch.tensor(self.parameters.gamma, device=self._device)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(
            [batch.logits, batch.images, batch.bn_loss],
            [logits_gradient.to(self._device), images_gradient.to(self._device), gamma],
        )
        self._optimizer.step()
        self.iteration += 1

    def step_alone(self) -> torch.Tensor:
        """Step the generator without a student, by β·CE(T, y) + γ·L_BNS, and return the cross-entropy."""
        batch = self._take_pending()
        cross_entropy = nn.functional.cross_entropy(batch.logits, batch.labels)
        self._optimizer.zero_grad(set_to_none=True)
        (self.parameters.beta * cross_entropy + self.parameters.gamma * batch.bn_loss).backward()
        self._optimizer.step()
        self.iteration += 1
        return cross_entropy.detach()

    def _take_pending(self) -> _Pending:
        if self._pending is None:
            raise RuntimeError("there is no batch to step with")
        pending, self._pending = self._pending, None
        return pending

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that the next steps depend on, on the CPU. A drawn batch counts as not drawn yet."""
        state = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        rng = self._random.get_state()
        if self._pending is not None:
            rng = self._pending.rng
            state |= {f"generator.{name}": tensor for name, tensor in self._pending.buffers.items()}
        for index, slots in self._optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
        state["random"] = rng
        state["iteration"] = torch.tensor(self.iteration)
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what :meth:`state` returned.

        Raises:
            ValueError: The state is not of such a generator.
        """
        weights = {k.removeprefix("generator."): v for k, v in state.items() if k.startswith("generator.")}
        slots: dict[int, dict[str, torch.Tensor]] = {}
        try:
            for name, tensor in state.items():
                if name.startswith("optimizer."):
                    _, index, slot = name.split(".")
                    slots.setdefault(int(index), {})[slot] = tensor
            self.generator.load_state_dict(weights)
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": slots, "param_groups": groups})
            self._random.set_state(state["random"])
            self.iteration = int(state["iteration"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError("the state is not of this generator") from error
        self._pending = None
