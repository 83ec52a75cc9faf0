"""The captured graph computes what the model computes, and has one form for each operation."""

import operator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F

from services.common.errors import InvalidArgumentError
from services.common.models.archive import Pt2Archive
from services.common.models.canonical import canonicalize
from services.common.models.capture import capture
from services.common.models.exported import read_program
from tests.support.models import settle
from tests.support.pt2 import export

MODULES = (
    nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten,
)  # fmt: skip
FUNCTIONS = (operator.add, operator.mul, torch.cat, operator.getitem, torch.reshape, torch.transpose, torch.chunk)


def check(graph: fx.GraphModule, model: nn.Module, shape: tuple[int, ...]) -> None:
    for batch in (1, 3):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected, result = model(x), graph(x)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called)), "each module is called once"
    assert not graph.training
    for node in graph.graph.nodes:
        assert node.op in ("placeholder", "call_module", "call_function", "get_attr", "output")
        if node.op in ("call_module", "placeholder"):
            assert node.meta["tensor_meta"].shape[0] == 1
        if node.op == "call_module":
            assert not getattr(graph.get_submodule(node.target), "inplace", False)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "densenet121",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
        "googlenet",
    ],
)
def test_torchvision(name: str) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    model = settle(torchvision.models.get_model(name, weights=None, num_classes=10, **options))
    graph = capture(model, (3, 64, 64))
    check(graph, model, (3, 64, 64))
    for node in graph.graph.nodes:
        if node.op == "call_module":
            assert isinstance(graph.get_submodule(node.target), MODULES)
        if node.op == "call_function":
            assert node.target in FUNCTIONS


class Idioms(nn.Module):
    """The same operations in the many ways that people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.second = nn.Conv2d(8, 8, 2, padding="same", padding_mode="reflect")
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 0.7))
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        y = F.relu6(x, True)
        x = x + y
        x.mul_(2)
        z = self.relu(x)
        x += z
        x = self.relu(self.second(x) * self.scale).contiguous()
        x = F.avg_pool2d(x, x.shape[2:])
        x = self.dropout(x).view(x.size(0), -1)
        logits: torch.Tensor = self.fc(F.dropout(x, 0.5, self.training))
        return logits.clamp(min=0)


def test_idioms() -> None:
    model = Idioms().eval()
    model.norm.load_state_dict({"running_mean": torch.randn(8), "running_var": torch.rand(8) + 0.5}, strict=False)
    graph = capture(model, (3, 8, 10))
    check(graph, model, (3, 8, 10))
    kinds = [type(graph.get_submodule(n.target)) for n in graph.graph.nodes if n.op == "call_module"]
    assert kinds.count(nn.ReLU) == 3
    assert kinds.count(nn.ReLU6) == kinds.count(nn.AdaptiveAvgPool2d) == kinds.count(nn.Flatten) == 1
    assert nn.Dropout not in kinds


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.around = nn.ZeroPad2d(1)
        self.ones = nn.ConstantPad2d(1, 1.0)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=(0, 1)) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs[0](self.around(x))
        x = self.convs[1](F.pad(x, (1, 1)))
        x = self.convs[2](F.pad(x, (0, 1, 0, 1), value=0))
        x = self.convs[3](self.ones(x))
        x = self.convs[4](F.pad(x, (1, 1, 1, 1), mode="replicate"))
        return x.mean((2, 3))


@pytest.mark.parametrize("exported", [False, True])
def test_zeros_around_an_image_join_the_padding_of_the_convolution_where_both_sides_have_as_many(
    exported: bool, tmp_path: Path
) -> None:
    model = Padded().eval()
    graph = capture(model, (3, 12, 12))
    if exported:
        archive = export(model, (3, 12, 12), tmp_path / "padded.pt2")
        graph = canonicalize(*read_program(Pt2Archive(archive)))
    else:
        check(graph, model, (3, 12, 12))
    pads = [tuple(node.args[1:]) for node in graph.graph.nodes if node.target is F.pad]
    assert pads[1:] == [([1, 1, 1, 1], "constant", 1.0), ([1, 1, 1, 1], "replicate")]
    assert pads[0] == ([1, 2, 0, 1], "constant", 0.0)  # the convolution's own is in it
    paddings = [m.padding for m in graph.modules() if isinstance(m, nn.Conv2d)]
    assert paddings == [(1, 2), (0, 2), (0, 0), (0, 1), (0, 1)]


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_control_flow_on_data_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        capture(Branching(), (3, 8, 8))
    assert caught.value.reason == "MODEL_NOT_TRACEABLE"


def test_images_that_do_not_pass_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(InvalidArgumentError) as caught:
        capture(model, (3, 9, 8))
    assert caught.value.reason == "INPUT_SHAPE_MISMATCH"
    assert "3×9×8" in caught.value.message
