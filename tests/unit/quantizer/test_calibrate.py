import pytest
import torch
from torch import Tensor, nn

from services.quantizer.calibrate import calibrate
from services.quantizer.config import Quantization
from services.quantizer.learned import ActivationQuantizer, QuantizedLayer
from services.quantizer.student import build_student
from tests.support.models import captured

SHAPE = (3, 8, 8)


class Joined(nn.Module):
    """A 1×1 convolution reads two values side by side, the later one first; it has no border and no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU()
        self.relu6 = nn.ReLU6()
        self.joint = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        side_by_side = torch.cat([self.relu6(self.right(x) * 4), self.relu(self.left(x))], 1)
        logits: Tensor = self.joint(side_by_side).mean((2, 3))
        return logits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layers_mean_output_is_that_of_unrounded_weights_and_unrounded_inputs(bits: int) -> None:
    model = captured(Joined(), SHAPE)
    layer = model.get_submodule("joint")
    assert isinstance(layer, nn.Conv2d)
    images = 2 * torch.randn(128, *SHAPE, generator=torch.Generator().manual_seed(0))
    student = build_student(model, Quantization(bits, bits))
    calibrate(student, images)
    values: dict[ActivationQuantizer, Tensor] = {}
    for module in student.modules():
        if isinstance(module, ActivationQuantizer):
            module.register_forward_pre_hook(lambda m, args: values.update({m: args[0]}))
    quantized = student.get_submodule("joint")
    assert isinstance(quantized, QuantizedLayer)
    assert layer.bias is not None
    read: list[Tensor] = []
    quantized.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        student(images)
        by_channel = quantized.quantizer.gather(lambda made: values[made].transpose(0, 1).flatten(1)).double()
        wanted = layer.weight.double().flatten(1) @ by_channel.mean(1) + layer.bias.double()
        rounded = (quantized.weight_codes() * quantized.log_step.exp().view(-1, 1, 1, 1)).double().flatten(1)
        got = rounded @ read[0].double().mean((0, 2, 3)) + quantized.bias.double()
    assert torch.allclose(got, wanted, atol=1e-4 * float(by_channel.std()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layers_output_changes_as_much_as_that_of_unrounded_weights_and_inputs(bits: int) -> None:
    rng = torch.Generator().manual_seed(1)
    model = captured(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.Flatten()), SHAPE)
    second = model.get_submodule("2")
    assert isinstance(second, nn.Conv2d)
    images = torch.randn(64, *SHAPE, generator=rng) * torch.rand(64, 1, 1, 1, generator=rng).exp()
    student = build_student(model, Quantization(bits, bits))
    calibrate(student, images)
    quantized = student.get_submodule("2")
    assert isinstance(quantized, QuantizedLayer)
    values: list[Tensor] = []
    got: list[Tensor] = []
    quantizer = quantized.quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.register_forward_pre_hook(lambda m, args: values.append(args[0]))
    quantized.register_forward_hook(lambda m, args, output: got.append(output))
    with torch.no_grad():
        student(images)
        wanted = second(values[0])
    given, exact = (x.double().transpose(0, 1).flatten(1) for x in (got[0], wanted))
    given, exact = given - given.mean(1, keepdim=True), exact - exact.mean(1, keepdim=True)
    slope = (given * exact).sum(1) / exact.square().sum(1)
    assert torch.allclose(slope, torch.ones_like(slope), atol=1e-4)


class Unequal(nn.Module):
    """A layer without a ReLU that a mixing layer reads, and one that a depthwise layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.mixing = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.depthwise(self.mixing(self.first(x))).mean((2, 3))
        return logits


@pytest.mark.parametrize(("weights", "activations"), [(4, 8), (4, 4), (8, 8)])
def test_scales_take_over_from_weights_where_codes_have_bits_to_spare(weights: int, activations: int) -> None:
    model = captured(Unequal(), SHAPE)
    model.get_parameter("mixing.weight").data.mul_(torch.logspace(-2, 0, 8).view(1, -1, 1, 1))
    images = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    student = build_student(model, Quantization(weights, activations))
    largest: dict[str, Tensor] = {}
    for name, module in student.named_modules():
        if isinstance(module, ActivationQuantizer):
            module.register_forward_hook(
                lambda m, args, codes, name=name: largest.update({name: codes.abs().amax((0, 2, 3))})
            )
    calibrate(student, images)
    read = {name: layer.quantizer for name, layer in student.named_modules() if isinstance(layer, QuantizedLayer)}
    names = {module: name for name, module in student.named_modules()}
    mixed, apart = (largest[names[read[name]]] for name in ("mixing", "depthwise"))
    full = (mixed / mixed.max()).tolist()
    if (weights, activations) == (4, 8):
        # The weights' own ratio is 100, of which the square root moves, to no more than two bits.
        assert full[-1] > 0.8
        assert max(full[:2]) < 0.35
        assert min(full) > 0.2
    else:
        assert min(full) > 0.6
    assert float(apart.min() / apart.max()) > 0.6
