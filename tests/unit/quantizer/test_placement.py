from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from services.quantizer.calibrate import calibrate
from services.quantizer.config import Quantization
from services.quantizer.learned import ActivationQuantizer, CodeRange
from services.quantizer.placement import PADDED_SHARE, codes_of_pixels
from services.quantizer.student import build_student
from tests.support.models import captured
from tests.support.networks import NETWORKS, SHAPE


class TwoWidths(nn.Module):
    """Two layers read one value; another value's name is that of the first with the second width after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU()
        self.fine = nn.Conv2d(4, 6, 3, padding=1)
        self.coarse = nn.Conv2d(4, 6, 1)
        self.relu_8 = nn.ReLU()
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.relu(self.stem(x))
        logits: Tensor = self.last(self.relu_8(self.coarse(shared) + self.fine(shared))).mean((2, 3))
        return logits


def rectified(student: nn.Module) -> dict[str, int]:
    """Largest codes of what is not signed, by the value's name."""
    made = {name: m for name, m in student.named_modules() if isinstance(m, ActivationQuantizer)}
    return {name.removeprefix("codes_"): m.code_range.hi for name, m in made.items() if not m.code_range.signed}


def test_a_value_read_at_two_widths_has_codes_of_its_own_for_each() -> None:
    model = captured(TwoWidths(), (1, 8, 8))
    student = build_student(model, Quantization(4, 4, overrides={"fine": (None, 8)}))
    made = [(len(m.log_scale), m.bits) for m in student.modules() if isinstance(m, ActivationQuantizer)]
    assert sorted(made) == [(1, 8), (4, 4), (4, 8), (5, 8), (6, 4)]
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate(student, images)
    with torch.no_grad():
        wanted, given = model(images), student(images)
    assert float((given - wanted).square().mean()) < 0.05 * float(wanted.square().mean())


@pytest.mark.parametrize(
    ("mean", "std", "wanted"),
    [
        ([127 / 255] * 3, [128 / 255] * 3, CodeRange(-127, 128)),
        ([0.2860], [0.3530], CodeRange(-73, 182)),
        ([0.0], [1.0], CodeRange(0, 255)),
        ([0.5], [0.5], None),  # zero lies in the middle between two levels
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], None),  # and here at another level in each channel
    ],
)
def test_pixels_are_read_without_an_error_where_codes_allow_it(
    mean: list[float], std: list[float], wanted: CodeRange | None
) -> None:
    shift, scale = torch.tensor(mean), torch.tensor(std)
    black, white = -shift / scale, (1 - shift) / scale
    found = codes_of_pixels(black, white)
    assert found == wanted
    if found is None:
        return
    levels = (torch.arange(256) / 255 - shift[:, None]) / scale[:, None]
    quantizer = ActivationQuantizer(len(mean), found, 8, step=(white - black) / 255)
    codes = quantizer(levels.unsqueeze(0))
    assert torch.equal(codes, (torch.arange(256.0) + found.lo).expand_as(codes))


def test_a_byte_is_filled_where_layers_that_do_not_pad_alone_read_it() -> None:
    model = captured(NETWORKS["SamePadding"](), SHAPE)
    for bits in (8, 7):
        student = build_student(model, Quantization(8, bits), (torch.full((3,), -127 / 128), torch.ones(3)))
        made = {name: m for name, m in student.named_modules() if isinstance(m, ActivationQuantizer)}
        # Behind the first ReLU6 more values would be padded than may be; behind the last a mean is taken, whose own
        # values are codes again that the classifier alone reads.
        assert Counter(rectified(student).values()) == ({255: 2, 127: 2} if bits == 8 else {127: 4})
        assert made["codes_x"].code_range == CodeRange(-127, 128)
        assert not made["codes_x"].learns


@pytest.mark.parametrize(("share", "wanted"), [(1.0, 255), (PADDED_SHARE, 255), (0.01, 127), (0.0, 127)])
def test_few_values_may_be_padded_so_that_their_codes_fill_a_byte(
    share: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.quantizer.placement.PADDED_SHARE", share)
    student = build_student(captured(NETWORKS["NarrowStem"](), SHAPE), Quantization(8, 8))
    # What the stem makes is 2 % of what layers read.
    assert rectified(student) == {"relu6": wanted, "relu6_1": 255, "relu6_2": 255, "relu6_3": 127, "mean_1": 255}


def test_the_first_values_are_padded_and_none_behind_one_that_is_too_many() -> None:
    student = build_student(captured(NETWORKS["resnext"](), SHAPE), Quantization(8, 8))
    inner = {name: hi for name, hi in rectified(student).items() if name.endswith("0_relu")}
    assert list(inner.values()) == [255, 127, 127, 127]
