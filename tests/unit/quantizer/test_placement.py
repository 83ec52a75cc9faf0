import torch
from torch import Tensor, nn

from services.quantizer.calibrate import calibrate
from services.quantizer.config import Quantization
from services.quantizer.learned import ActivationQuantizer
from services.quantizer.student import build_student
from tests.support.models import captured


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
