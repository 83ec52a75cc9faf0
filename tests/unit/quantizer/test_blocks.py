"""Students and teachers compute the same with fused blocks as without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from services.common.kernels import blocks, norms
from services.common.kernels.blocks import fuse_blocks
from services.common.models.cifar_resnet import resnet20
from services.generator.bn_statistics import BatchNormStatistics
from services.quantizer.batches import Batch, ReplaySource
from services.quantizer.config import ActivationGranularity, GeneratorLosses, Quantization, Training
from services.quantizer.features import keep_output
from services.quantizer.student import build_student, no_grad_copy
from services.quantizer.training import Trainer, _own_bits
from tests.support.kernels import compile_or_skip
from tests.support.models import Bottleneck, Residual, captured

torch.set_num_threads(1)
SHAPE = (3, 16, 16)
QUANTIZATION = Quantization(4, 4, activation_granularity=ActivationGranularity.PER_SAMPLE_CHANNEL)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 19),
    "residual": (Residual, 4),
    "bottleneck": (Bottleneck, 4),
}  # blocks of each


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_or_skip(norms.library)


def images(count: int = 5) -> Tensor:
    x = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every block that is fused."""
    counted: list[int] = []

    def counting(*arguments: object) -> object:
        counted.append(1)
        return norms.fused(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "fused", counting)
    return counted


def gradients(run: nn.Module, of: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = run(x)
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    return logits, list(torch.autograd.grad(loss, [x, *of.parameters()]))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_student_computes_the_same(name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build, count = NETWORKS[name]
    student = build_student(captured(build(), SHAPE), QUANTIZATION)
    names = list(student.state_dict())
    view = fuse_blocks(student, _own_bits)
    assert list(student.state_dict()) == names
    x = images() if channels_last else images().detach().contiguous().requires_grad_()
    counted = calls(monkeypatch)
    logits, got = gradients(view, student, x)
    assert len(counted) == count  # whatever the images' layout, convolutions make channels last
    want_logits, want = gradients(student, student, x)
    assert torch.equal(logits, want_logits)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_teacher_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, count = NETWORKS[name]
    teacher = no_grad_copy(captured(build(), SHAPE))
    x, counted = images(), calls(monkeypatch)
    with BatchNormStatistics(teacher) as statistics:

        def losses(run: fx.GraphModule) -> tuple[Tensor, Tensor, Tensor]:
            logits = run(x)
            loss = statistics.take_loss()
            (gradient,) = torch.autograd.grad(logits.square().sum() + loss, x)
            return logits, loss, gradient

        want_logits, want_loss, want = losses(teacher)
        assert not counted
        logits, loss, got = losses(fuse_blocks(teacher, listener=statistics.add))
    assert len(counted) == count
    assert torch.equal(logits, want_logits)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_hooked_layer_runs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    student = build_student(captured(Residual(), SHAPE), QUANTIZATION)
    view = fuse_blocks(student, _own_bits)
    x, kept = images(), dict[str, Tensor]()
    handle = student.get_submodule("body.1").register_forward_hook(keep_output(kept, "body.1"))
    counted = calls(monkeypatch)
    logits = view(x)
    assert list(kept) == ["body.1"]
    assert len(counted) == 3
    handle.remove()
    assert torch.equal(view(x), logits)
    assert len(counted) == 7


def test_an_installation_without_a_compiler_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    student = build_student(captured(Residual(), SHAPE), QUANTIZATION)
    view = fuse_blocks(student, _own_bits)
    x = images()
    logits = view(x)
    monkeypatch.setattr(norms, "library", lambda: None)
    assert torch.equal(view(x), logits)


def kept_bytes(run: nn.Module, x: Tensor, model: nn.Module) -> int:
    """Return the size of all that autograd keeps of a forward pass beside the parameters and the images."""
    known = {t.data_ptr() for t in (x, *model.state_dict().values())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor  # and so nothing else takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_less_is_kept_for_the_gradients() -> None:
    model, x = captured(resnet20(), SHAPE), images(16)
    student, teacher = build_student(model, QUANTIZATION), no_grad_copy(model)
    # Of a student: what each convolution reads and gives, and its quantized weight. Of a teacher: what each gives, and
    # the shortcuts.
    assert kept_bytes(fuse_blocks(student, _own_bits), x, student) < 0.72 * kept_bytes(student, x, student)
    assert kept_bytes(fuse_blocks(teacher), x, teacher) < 0.8 * kept_bytes(teacher, x, teacher)


def test_bfloat16_stays_within_the_layers() -> None:
    model = captured(resnet20(), SHAPE)
    data = Batch(images(8).detach(), torch.zeros(8, dtype=torch.int64), torch.zeros(8, 10))
    training = Training(co_train=False, learning_rate=0.01, epochs=1, iterations_per_epoch=2, batch_size=8, seed=0)
    found = []
    for bfloat16 in (False, True):
        student = build_student(model, QUANTIZATION)
        source = ReplaySource(data, 8, 0, torch.device("cpu"))
        trainer = Trainer(student, training, GeneratorLosses(), source, bfloat16=bfloat16)
        loss, _ = trainer.step()
        assert loss.dtype is torch.float32
        assert all(p.dtype is torch.float32 and p.grad is not None for p in student.parameters())
        found.append((float(loss), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])))
    assert found[0][0] != found[1][0]
    assert found[1][0] == pytest.approx(found[0][0], rel=0.05)
    assert torch.cosine_similarity(found[0][1], found[1][1], 0) > 0.9
