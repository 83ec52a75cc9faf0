from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.bench import Bench
from granq.v1 import common_pb2
from services.common.models import LoadedModel
from services.quantizer.config import ActivationGranularity, Quantization
from services.quantizer.fake_quant import DynamicActivation
from tests.support.models import Residual, captured

SHAPE = (3, 8, 8)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    torch.set_num_threads(1)
    model = LoadedModel(captured(Residual(), SHAPE), SHAPE, 10, common_pb2.MODEL_FORMAT_TORCH_EXPORT)
    return Bench(model, 100 * torch.randn(20, *SHAPE), torch.zeros(20, dtype=torch.int64), tmp_path)


@pytest.mark.parametrize("granularity", [ActivationGranularity.PER_TENSOR, ActivationGranularity.PER_CHANNEL])
def test_measuring_on_test_images_moves_no_range(bench: Bench, granularity: ActivationGranularity) -> None:
    quantization = Quantization(4, 4, activation_granularity=granularity, fold=False)
    student = bench.student(quantization, torch.randn(16, *SHAPE))
    moving = [module for module in student.modules() if isinstance(module, DynamicActivation)]
    before = [module.hi.clone() for module in moving]
    bench.simulated(student)
    assert moving
    for module, hi in zip(moving, before, strict=True):
        assert torch.equal(module.hi, hi)
        assert module.tracking


def test_generators_leave_no_hook_on_each_others_teacher(bench: Bench) -> None:
    synthesizers = [bench.synthesizer(4, seed) for seed in range(2)]
    assert all(len(module._forward_hooks) == 0 for module in bench.teacher.modules())
    assert synthesizers[0]._teacher is not synthesizers[1]._teacher


def test_a_replay_of_no_iterations_changes_nothing(bench: Bench) -> None:
    quantization = Quantization(4, 4)
    data = bench.synthesize(0, 16, 8, 0)
    student = bench.student(quantization, data.images)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    bench.replay(student, quantization, data, 0, 8, 0)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    bench.replay(student, quantization, data, 2, 8, 0)
    assert not all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
