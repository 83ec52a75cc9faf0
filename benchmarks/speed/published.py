"""The method as published, written the straightforward way: the baseline of the speed tables.

Eager float32 in the default memory format. Fake quantization is a chain of minimum, maximum, scale, subtract, round,
add and divide, each a pass over the tensor. An iteration runs the student twice, once for the generator's loss and once
for its own, and the generator's backward pass also computes the gradients of the teacher's and the student's
parameters, which nobody reads: with F one forward pass, 9F of convolution.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.generator.bn_statistics import BatchNormStatistics
from services.generator.networks import LATENT, ConditionalBatchNorm2d, ConditionalGenerator, UpsampledConv2d
from services.quantizer.config import GeneratorLosses, Training
from services.quantizer.losses import generator_loss, student_loss


class FakeQuantizeChain(torch.autograd.Function):
    """Seven operations forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
        """Return ``x`` rounded to 2^bits levels between the minimum and maximum over ``dims``."""
        lo = torch.amin(x, dims, keepdim=True)
        hi = torch.amax(x, dims, keepdim=True)
        scale = (2**bits - 1) / torch.clamp(hi - lo, min=1e-8)
        zero_point = torch.round(scale * lo) + 2 ** (bits - 1)
        codes = torch.round(scale * x - zero_point)
        result: Tensor = (codes + zero_point) / scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Pass the gradient straight through."""
        return grads[0], None, None


def fake_quantize_chain(x: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
    """Return ``x`` fake-quantized by the chain."""
    result: Tensor = FakeQuantizeChain.apply(x, dims, bits)
    return result


def fake_quantize_loop(x: Tensor, bits: int) -> Tensor:
    """Return N×C×H×W fake-quantized one sample and channel after the other, as GranQ's comparison has it."""
    every = [fake_quantize_chain(channel, (0, 1), bits) for sample in x for channel in sample]
    return torch.stack(every).view_as(x)


class _Activation(nn.Module):
    def __init__(self, relu: nn.Module, bits: int) -> None:
        super().__init__()
        self.relu, self.bits = relu, bits

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x), fake-quantized per sample and channel."""
        return fake_quantize_chain(self.relu(x), (2, 3), self.bits)


class _Conv2d(nn.Module):
    def __init__(self, conv: nn.Conv2d, bits: int) -> None:
        super().__init__()
        self.conv, self.bits = conv, bits

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the weight fake-quantized per output channel."""
        conv = self.conv
        weight = fake_quantize_chain(conv.weight, (1, 2, 3), self.bits)
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class _Linear(nn.Module):
    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.linear, self.bits = linear, bits

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight fake-quantized per output."""
        return F.linear(x, fake_quantize_chain(self.linear.weight, (1,), self.bits), self.linear.bias)


def published_student(network: nn.Module, bits: int) -> nn.Module:
    """Return a copy of a network whose weights and ReLU outputs are fake-quantized, in evaluation mode."""
    student = copy.deepcopy(network)
    for name, module in list(student.named_modules()):
        replacement: nn.Module
        if isinstance(module, nn.ReLU | nn.ReLU6):
            replacement = _Activation(module, bits)
        elif isinstance(module, nn.Conv2d):
            replacement = _Conv2d(module, bits)
        elif isinstance(module, nn.Linear):
            replacement = _Linear(module, bits)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, replacement)
    return student.eval()


class _EnlargedConv2d(nn.Module):
    """Nearest-neighbour enlargement, then a 3×3 convolution."""

    def __init__(self, like: UpsampledConv2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(like.in_channels, like.out_channels, 3, padding=1)
        self.conv.load_state_dict(like.state_dict())

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the convolution of the enlarged input."""
        result: Tensor = self.conv(F.interpolate(x, size=size))
        return result


class _Norm(nn.Module):
    """BatchNorm over the batch, scale and shift, which may be each sample's, and leaky ReLU, one after the other."""

    def __init__(self, like: nn.Module, slope: float) -> None:
        super().__init__()
        self.like, self.slope = like, slope

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the activation."""
        like = self.like
        if isinstance(like, ConditionalBatchNorm2d):
            x = like.norm(x) * like.scale(labels)[:, :, None, None] + like.shift(labels)[:, :, None, None]
        elif isinstance(like, nn.BatchNorm2d):
            x = nn.BatchNorm2d.forward(like, x)
        return F.leaky_relu(x, self.slope) if self.slope < 1 else x


class PublishedIteration:
    """Joint training of a generator and a student, an iteration at a time.

    Args:
        network: The pretrained classifier, in evaluation mode.
        input_shape: C×H×W of one image.
        num_classes: Number of its logits.
        bits: Of weights and activations.
        training: Batch size, rates and temperature, filled in for the simulated family.
        device: Where to compute.
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: tuple[int, int, int],
        num_classes: int,
        bits: int,
        training: Training,
        device: torch.device,
    ) -> None:
        self._classes, self._training, self._device = num_classes, training, device
        self._losses = GeneratorLosses()
        self._teacher = copy.deepcopy(network).eval().to(device)
        self._statistics = BatchNormStatistics(self._teacher)
        self.student = published_student(network, bits).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self._generator: nn.Module = ConditionalGenerator(input_shape, num_classes)
        for name in ("conv1", "conv2"):
            convolution = self._generator.get_submodule(name)
            if not isinstance(convolution, UpsampledConv2d):
                raise TypeError(f"{name} is a {type(convolution).__name__}")
            setattr(self._generator, name, _EnlargedConv2d(convolution))
        for name, slope in (("norm0", 1.0), ("norm1", 0.2), ("norm2", 0.2)):
            setattr(self._generator, name, _Norm(self._generator.get_submodule(name), slope))
        self._generator.to(device).train()
        self._random = torch.Generator().manual_seed(training.seed)
        self._steps_generator = torch.optim.Adam(self._generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self._steps_student = torch.optim.SGD(
            self.student.parameters(),
            training.rate_of_weights,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            nesterov=True,
        )

    def step(self) -> tuple[Tensor, Tensor]:
        """Step the generator, then the student on the same images; return L_S and L_h + β·L_cls, detached."""
        size = self._training.batch_size
        z = torch.randn(size, LATENT, generator=self._random).to(self._device)
        labels = torch.randint(self._classes, (size,), generator=self._random).to(self._device)
        images = self._generator(z, labels)
        teacher, student = self._teacher(images), self.student(images)
        bn_loss = self._statistics.take_loss()
        loss_generator = generator_loss(teacher, student, labels, self._losses)
        self._steps_generator.zero_grad()
        (loss_generator + bn_loss).backward()
        self._steps_generator.step()
        loss_student = student_loss(teacher.detach(), self.student(images.detach()), self._training.temperature)
        self._steps_student.zero_grad()
        loss_student.backward()
        self._steps_student.step()
        return loss_student.detach(), loss_generator.detach()
