"""Small members of torchvision's families, and graphs that are unusual but plausible; images are 3×32×32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import densenet, efficientnet, mobilenetv2, mobilenetv3, regnet, resnet, shufflenetv2, vgg

SHAPE = (3, 32, 32)
CLASSES = 10


def resnext() -> nn.Module:
    """ResNet-50's block with grouped convolutions."""
    network: nn.Module = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], CLASSES, groups=4, width_per_group=8)
    return network


def mobilenet_v2() -> nn.Module:
    """Linear bottlenecks with and without a skip."""
    network: nn.Module = mobilenetv2.MobileNetV2(CLASSES, 0.25, [[1, 16, 1, 1], [6, 32, 2, 2]], 4)
    return network


def mobilenet_v3() -> nn.Module:
    """Hardswish, squeeze-excite with Hardsigmoid, and blocks without either."""
    settings = [
        mobilenetv3.InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        mobilenetv3.InvertedResidualConfig(16, 5, 48, 24, True, "HS", 2, 1, 1.0),
        mobilenetv3.InvertedResidualConfig(24, 5, 72, 24, False, "HS", 1, 2, 1.0),
    ]
    network: nn.Module = mobilenetv3.MobileNetV3(settings, 64, CLASSES)
    return network


def efficientnet_b() -> nn.Module:
    """SiLU, and squeeze-excite with a logistic gate."""
    settings = [
        efficientnet.MBConvConfig(1, 3, 1, 16, 8, 1, 1.0, 1.0),
        efficientnet.MBConvConfig(4, 3, 1, 8, 8, 1, 1.0, 1.0),
    ]
    network: nn.Module = efficientnet.EfficientNet(settings, dropout=0.2, num_classes=CLASSES, last_channel=64)
    return network


def regnet_y() -> nn.Module:
    """Grouped convolutions and squeeze-excite behind ReLU."""
    blocks = regnet.BlockParams.from_init_params(depth=2, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25)
    network: nn.Module = regnet.RegNet(blocks, CLASSES)
    return network


def densenet_bc() -> nn.Module:
    """BatchNorm behind concatenations, average pooling between blocks."""
    network: nn.Module = densenet.DenseNet(8, (2, 2), 16, num_classes=CLASSES)
    return network


def shufflenet_v2() -> nn.Module:
    """Splits, concatenations and channel shuffles."""
    network: nn.Module = shufflenetv2.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], CLASSES)
    return network


def vgg_bn() -> nn.Module:
    """VGG's plain stack, whose pooled features a linear layer reads pixel by pixel."""
    features = vgg.make_layers([8, "M", 16, "M", 16, 16, "M", 16, "M"], batch_norm=True)
    head = [nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten(), nn.Linear(16 * 49, 32), nn.ReLU(True), nn.Dropout()]
    return nn.Sequential(features, *head, nn.Linear(32, CLASSES))


def _unit(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    *,
    padded: bool = True,
) -> nn.Module:
    padding = dilation * (kernel // 2) if padded else 0
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Idioms(nn.Module):
    """Functional activations and poolings, grouped and dilated convolutions, ReLU6 in place, dropout, pixel means."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm2d(3, affine=False)
        self.stem = _unit(3, 16, stride=2)
        self.grouped = _unit(16, 16, groups=4)
        self.dilated = _unit(16, 16, dilation=2)
        self.relu6 = nn.ReLU6(inplace=True)
        self.side = nn.Conv2d(16, 16, 1)
        self.first = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16 * 4 + 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(self.normalize(x)))
        x = self.relu6(self.grouped(x)) + F.dropout(self.dilated(x), 0.1, self.training)
        pooled = F.adaptive_avg_pool2d(F.leaky_relu(self.side(x)), 2)
        mean = torch.relu(self.norm(self.first(x.mean([2, 3]))))
        logits: Tensor = self.last(torch.cat([pooled.flatten(1), mean], 1))
        return logits


class Branches(nn.Module):
    """Inception: branches side by side, pooled by maximum and by average, and a residual sum over a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 16, stride=2)
        self.left, self.middle, self.right = _unit(16, 8, 1), _unit(16, 16), _unit(16, 8, 1)
        self.up = _unit(32, 32, 1)
        self.signed = _unit(32, 16, 1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
        x = torch.cat([self.left(x).relu(), self.middle(x).relu(), self.right(pooled).relu()], 1)
        x = F.relu(F.max_pool2d(x, 2) + self.up(F.max_pool2d(x, 2)))
        x = torch.cat([x, self.signed(x), -self.signed(x)], dim=1)  # signs differ: quantized behind the concatenation
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, (1, 1)).view(x.shape[0], -1))
        return logits


class PreActivation(nn.Module):
    """BatchNorm before convolutions, behind a sum; the image is normalized inside; padding is asymmetric."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, 16, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(F.pad((x - self.mean) / 0.25, (0, 1, 0, 1)))
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = x + conv(F.relu(norm(x)))
        logits: Tensor = self.fc(torch.flatten(F.relu(self.norms[2](x)).mean((2, 3), keepdim=True), 1))
        return logits


class SamePadding(nn.Module):
    """TensorFlow's padding, as ports from there have it: zeros on one side more than on the other, before the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 16, stride=2, padded=False)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.depthwise = _unit(16, 16, stride=2, groups=16, padded=False)
        self.project = _unit(16, 8, 1)
        self.last = _unit(8, 16, padded=False)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(self.pad(x)))
        x = F.relu6(self.depthwise(F.pad(x, (0, 1, 0, 1))))
        x = self.project(x)
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)  # signed codes in a padding that no layer absorbs
        x = F.relu6(self.last(F.pad(x, [1, 1, 1, 1])))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class NarrowStem(nn.Module):
    """A first layer that makes few of all values, read by a layer that pads and behind a padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 2, stride=2)
        self.left = _unit(2, 32)
        self.right = _unit(2, 32, padded=False)
        self.mix = _unit(32, 32, 1)
        self.last = _unit(32, 32, 1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = F.relu6(self.left(x) + self.right(F.pad(x, (0, 2, 0, 2))))
        x = F.relu6(self.last(F.relu6(self.mix(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (
        resnext,
        mobilenet_v2,
        mobilenet_v3,
        efficientnet_b,
        regnet_y,
        densenet_bc,
        shufflenet_v2,
        vgg_bn,
        Idioms,
        Branches,
        PreActivation,
        SamePadding,
        NarrowStem,
    )
}
