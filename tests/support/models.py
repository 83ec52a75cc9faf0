"""Small networks with plausible BatchNorm statistics, as model intake would hand them on."""

import torch
from torch import fx, nn

from services.common.models.capture import capture


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights from the seed, and BatchNorm statistics and affines that are not the defaults."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            spread = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=rng) * spread)
            if module.bias is not None:
                module.bias.data.copy_(torch.randn(module.bias.shape, generator=rng) * 0.1)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)
    return model.eval()


def remember(model: fx.GraphModule, images: torch.Tensor) -> fx.GraphModule:
    """Give BatchNorm layers the statistics of ``images``, as if these had been the training data.

    The model computes what it did: γ and β change along, to the deviation and the mean of the output.
    """

    def adopt(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        dims = [d for d in range(args[0].dim()) if d != 1]
        var, mean = torch.var_mean(args[0], dims, correction=0)
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.add_((mean - norm.running_mean) * slope)
        norm.weight.copy_(slope * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    hooks = [norm.register_forward_pre_hook(adopt) for norm in norms]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return model


class Residual(nn.Module):
    """A stem, a residual block with a projection, one without, and a classifier: every kind of skip in 8×8 pixels."""

    def __init__(self, channels: int = 8, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.down = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels))
        self.project = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, 2, bias=False), nn.BatchNorm2d(2 * channels))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.body(x) + x)
        x = self.relu(self.down(x) + self.project(x))
        logits: torch.Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


class Bottleneck(nn.Module):
    """Inverted residual as in MobileNetV2: depthwise convolution, ReLU6, linear bottleneck with a skip, max pooling."""

    def __init__(self, channels: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()
        )
        self.pool = nn.MaxPool2d(2)
        wide = 3 * channels
        self.block = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.head = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.fc = nn.Linear(wide, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = x + self.block(x)
        logits: torch.Tensor = self.fc(self.head(x).mean([2, 3]))
        return logits


def captured(model: nn.Module, input_shape: tuple[int, int, int], seed: int = 0) -> fx.GraphModule:
    """Return the module-level graph of a settled model."""
    return capture(settle(model, seed), input_shape)
