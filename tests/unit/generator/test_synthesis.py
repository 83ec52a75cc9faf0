import pytest
import torch
from torch.nn import functional as F

from granq.v1 import common_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError
from services.generator import states
from services.generator.states import Effort, load_state, save_state
from services.generator.synthesis import SynthesisParameters, Synthesizer
from tests.support.models import Residual, captured

SHAPE = (3, 8, 8)


def _synthesizer(seed: int = 3, beta: float = 1.0, gamma: float = 1.0, bfloat16: bool = False) -> Synthesizer:
    given = SynthesisParameters(batch_size=6, seed=seed, beta=beta, gamma=gamma)
    return Synthesizer(captured(Residual(), SHAPE), SHAPE, 10, given, torch.device("cpu"), bfloat16=bfloat16)


def _step(synthesizer: Synthesizer) -> None:
    batch = synthesizer.draw()
    synthesizer.step(batch.images * 0.01, batch.logits * 0.01)


def _equal(a: Synthesizer, b: Synthesizer) -> bool:
    one, other = a.state(), b.state()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_seed_decides_all() -> None:
    torch.manual_seed(1)
    one = _synthesizer()
    torch.manual_seed(2)
    other, third = _synthesizer(), _synthesizer(seed=4)
    for synthesizer in (one, other, third):
        _step(synthesizer)
    assert _equal(one, other)
    assert not _equal(one, third)


def test_gradients_from_outside_are_those_of_the_whole_loss() -> None:
    """step(∂L/∂X, ∂L/∂T) is backward() of L(X, T) + γ·L_BNS."""
    split, whole = _synthesizer(gamma=0.7), _synthesizer(gamma=0.7)
    weight = torch.randn(6, 3, 8, 8)
    for _ in range(3):
        batch = split.draw()
        x, t = batch.images.clone().requires_grad_(), batch.logits.clone().requires_grad_()
        loss = (x * weight).mean() + F.cross_entropy(t, batch.labels)
        split.step(*torch.autograd.grad(loss, [x, t]))

        whole.draw()
        pending = whole._pending
        assert pending is not None
        outer = (pending.images * weight).mean() + F.cross_entropy(pending.logits, pending.labels)
        whole._optimizer.zero_grad()
        (outer + 0.7 * pending.bn_loss).backward()
        whole._optimizer.step()
        whole._pending = None
        whole.iteration += 1
    for one, other in zip(split.generator.parameters(), whole.generator.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_teacher_stays_frozen() -> None:
    teacher = captured(Residual(), SHAPE)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    synthesizer = Synthesizer(teacher, SHAPE, 10, SynthesisParameters(batch_size=4), torch.device("cpu"))
    synthesizer.draw()
    synthesizer.step_alone()
    assert not teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_training_lowers_the_losses() -> None:
    synthesizer = _synthesizer(beta=0.1)
    losses = []
    for _ in range(60):
        losses.append(float(synthesizer.draw().bn_loss))
        synthesizer.step_alone()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("drawn", [False, True])
def test_state_goes_on_bit_for_bit(drawn: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also while a batch waits for its gradients: then it is drawn again."""
    store = ArtifactStore(tmp_path_factory.mktemp("store").as_uri())
    undisturbed, other = _synthesizer(), _synthesizer()
    for _ in range(3):
        _step(undisturbed)
        _step(other)
    if drawn:
        other.draw()
    artifact = save_state(store, other, {"model": "a", "shape": SHAPE}, Effort(1.5, 0.25))
    resumed = _synthesizer()
    assert load_state(store, artifact, resumed, {"model": "a", "shape": SHAPE}) == Effort(1.5, 0.25)
    assert resumed.iteration == 3
    for _ in range(3):
        _step(undisturbed)
        _step(resumed)
    assert _equal(undisturbed, resumed)


def test_foreign_states_are_refused(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path_factory.mktemp("store").as_uri())
    artifact = save_state(store, _synthesizer(), {"model": "a", "seed": 3}, Effort())
    with pytest.raises(InvalidArgumentError) as caught:
        load_state(store, artifact, _synthesizer(), {"model": "b", "seed": 3})
    assert caught.value.reason == "STATE_MISMATCH"
    assert "model" in caught.value.message
    with monkeypatch.context() as patch:
        patch.setattr(states, "FORM", "generator/of-another-version")
        later = save_state(store, _synthesizer(), {"model": "a", "seed": 3}, Effort())
    with pytest.raises(InvalidArgumentError, match="of-another-version") as caught:
        load_state(store, later, _synthesizer(), {"model": "a", "seed": 3})
    assert caught.value.reason == "STATE_MISMATCH"
    with pytest.raises(InvalidArgumentError) as caught:
        load_state(store, store.put_bytes(b"not a state"), _synthesizer(), {})
    assert caught.value.reason == "STATE_INVALID"


def test_order_of_calls() -> None:
    synthesizer = _synthesizer()
    with pytest.raises(RuntimeError):
        synthesizer.step_alone()
    synthesizer.draw()
    with pytest.raises(RuntimeError):
        synthesizer.draw()


def test_defaults_of_the_contract() -> None:
    given = SynthesisParameters.of(common_pb2.GeneratorConfig(gamma=0.0), 16, 5)
    assert given == SynthesisParameters(batch_size=16, seed=5, learning_rate=1e-3, beta=1.0, gamma=0.0)


def test_bounds_hold_where_pixels_are_known_unless_the_request_says_otherwise() -> None:
    known = (torch.full((3,), -0.5), torch.full((3,), 0.5))

    def largest(bounded: bool) -> float:
        parameters = SynthesisParameters.of(common_pb2.GeneratorConfig(bounded=bounded), 6, 3)
        made = Synthesizer(captured(Residual(), SHAPE), SHAPE, 10, parameters, torch.device("cpu"), known)
        return float(made.draw(train=False).images.abs().max())

    assert largest(True) <= 0.5 < largest(False)
    assert SynthesisParameters.of(common_pb2.GeneratorConfig(), 6, 3).bounded


def test_bfloat16_stays_within_the_layers() -> None:
    wide, narrow = _synthesizer(), _synthesizer(bfloat16=True)
    one, other = wide.draw(), narrow.draw()
    assert {t.dtype for t in (other.images, other.logits, other.bn_loss)} == {torch.float32}
    assert 0 < float((other.images - one.images).square().mean()) < 1e-3
    assert float(other.bn_loss) == pytest.approx(float(one.bn_loss), rel=0.05)
    narrow.step(other.images * 0.01, other.logits * 0.01)
    assert all(tensor.dtype is not torch.bfloat16 for tensor in narrow.state().values())
