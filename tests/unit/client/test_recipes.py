"""Shipped recipes against the published settings, and what the reader refuses."""

from pathlib import Path
from typing import NamedTuple

import protovalidate
import pytest

import granq
from granq import recipes
from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2
from services.common.artifacts import ArtifactStore
from services.coordinator.requests import simulation_only
from services.coordinator.validation import check_spec
from services.quantizer.config import GeneratorLosses, Quantization, Training

MODEL = granq.model_source(artifacts_pb2.Artifact(digest=f"sha256:{'0' * 64}", name="model.pt2"))


class Schedule(NamedTuple):
    epochs: int
    warmup_epochs: int
    learning_rate: float | None
    milestones: tuple[int, ...]


CIFAR = Schedule(200, 4, 1e-4, (100, 200, 300))
IMAGENET = Schedule(400, 50, 1e-5, (350, 400))
NETWORKS = {
    "cifar10-resnet20": CIFAR,
    "cifar100-resnet20": CIFAR,
    "imagenet-resnet18": IMAGENET,
    "imagenet-resnet50": IMAGENET,
    "imagenet-mobilenetv2": IMAGENET,
}
# (α_ds, λ_l) by bits; CIFAR has those of 3 bits throughout.
IMAGENET_LOSSES = {3: (0.2, 0.1), 4: (0.2, 0.3), 5: (0.3, 0.3)}
PUBLISHED = [
    (f"simulated/{code}{network}-w{bits}a{bits}", network, bits, code)
    for network in NETWORKS
    for bits in (3, 4, 5)
    for code in ("", "published-code/")
]


def test_every_published_setting_has_a_recipe_and_no_other_is_called_simulated() -> None:
    simulated = [name for name in recipes.names() if name.startswith("simulated/")]
    assert simulated == sorted(name for name, *_ in PUBLISHED)
    assert [name for name in recipes.names() if name not in simulated] == ["deployable/default", "deployable/small"]


@pytest.mark.parametrize(("name", "network", "bits", "code"), PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_simulated_recipes_have_the_published_numbers(name: str, network: str, bits: int, code: str) -> None:
    spec = recipes.load(name)
    training, schedule = Training.from_proto(spec.training), NETWORKS[network]
    found = Schedule(training.epochs, training.warmup_epochs, training.learning_rate, training.milestones)
    assert found == schedule
    assert (training.momentum, training.weight_decay, training.temperature) == (0.9, 1e-4, 20)
    assert (training.iterations_per_epoch, training.batch_size) == (200, 16)
    assert (training.co_train, training.cosine, training.feature_weight) == (True, False, 0)
    quantization = Quantization.from_proto(spec.quantization)
    assert (quantization.weight_bits, quantization.activation_bits, quantization.overrides) == (bits, bits, {})
    assert quantization.activation_granularity.name == "PER_SAMPLE_CHANNEL"
    assert quantization.weight_granularity.name == ("PER_KERNEL" if code else "PER_OUTPUT_CHANNEL")
    disagreement, lower = IMAGENET_LOSSES[bits] if schedule is IMAGENET else (0.2, 0.1)
    generator = spec.synthesis.generator
    assert GeneratorLosses.from_proto(generator) == GeneratorLosses(disagreement, 0.1, lower, 0.8, 1.0)
    assert (generator.learning_rate, generator.gamma, generator.bounded) == (1e-3, 1.0, False)
    assert not spec.engines
    assert "simulated" in recipes.summary(recipes.read(name))
    assert ("code" in recipes.summary(recipes.read(name))) == bool(code)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_satisfies_the_contract(name: str, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    model = granq.model_source(store.put_bytes(b"model"))
    spec = recipes.combine(recipes.load(name), coordinator_pb2.PipelineSpec(model=model))
    protovalidate.validate(spec)
    check_spec(spec, store)
    assert simulation_only(spec) == name.startswith("simulated/")
    assert len(spec.engines) == (not simulation_only(spec))
    assert recipes.summary(recipes.read(name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  epoch: 3\n", r"r.yaml:2: training\.epoch: no such field; TrainingConfig has .*epochs"),
        ("training:\n  epochs: 3\n  epochs: 4\n", r"r.yaml:3: training\.epochs: given twice"),
        ("training:\n  epochs: many\n", r"r.yaml:2: training\.epochs: "),
        ("training: {epochs: true}\n", r"r.yaml:1: training\.epochs: "),
        ("training: {epochs: 1.5}\n", r"r.yaml:1: training\.epochs: "),
        ("training:\n  epochs:\n", r"r.yaml:2: training\.epochs: has no value"),
        ("training: 3\n", "r.yaml:1: training: must be a mapping"),
        ("engines: {}\n", "r.yaml:1: engines: must be a list"),
        ("engines:\n  - {}\n  - {speed: 3}\n", r"r.yaml:3: engines\[1\]\.speed: no such field"),
        ("\nquantization: {activation_granularity: FINE}\n", r"r.yaml:2: quantization\.activation_granularity: .*FINE"),
        ("model: {architecture: resnet18}\n", "r.yaml:1: model: a recipe has no model"),
        ("display_name: 2020-01-01\n", "r.yaml:1: display_name: "),
        ("? [a]\n: 3\n", "r.yaml:1: .*no such field"),
        ("training: [", "not a YAML document"),
        ("training: !!python/object/apply:os.system ['true']\n", "r.yaml:1: training: must be a mapping"),
        ("display_name: !!python/object/apply:os.system ['true']\n", "not a YAML document"),
        ("", "empty"),
        ("- 1\n", "the recipe: must be a mapping"),
    ],
)
def test_what_is_not_a_recipe_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.parse(text, "r.yaml")


def test_names_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("training: {epochs: 7}\n")
    assert recipes.load(str(tmp_path / "mine.yaml")).training.epochs == 7
    with pytest.raises(ValueError, match="did you mean deployable/small"):
        recipes.load("deployable/smal")
    with pytest.raises(ValueError, match=r"no recipe '\.\./pyproject'"):
        recipes.load("../pyproject")
    with pytest.raises(FileNotFoundError):
        recipes.load(str(tmp_path / "none.yaml"))


def test_what_is_given_comes_before_the_recipe() -> None:
    recipe = recipes.parse(
        "quantization: {weight_bits: 3, activation_bits: 3, overrides: [{layer: conv1, weight_bits: 8}]}\n"
        "training: {epochs: 9, seed: 5, milestones: [1, 2]}\n"
        "dataset: {path: cifar, format: DATASET_FORMAT_CIFAR, preprocessing: {mean: [0.5], resize: 40}}\n",
        "r",
    )
    before = recipe.SerializeToString()
    given = granq.pipeline_spec(
        MODEL,
        quantization=granq.quantization_config(0, 4, overrides={"fc": (8, 8)}),
        training=granq.training_config(epochs=0),
        dataset=granq.dataset(MODEL.artifact, "npz", mean=[0.25]),
    )
    spec = recipes.combine(recipe, given)
    assert (spec.quantization.weight_bits, spec.quantization.activation_bits) == (3, 4)
    assert [override.layer for override in spec.quantization.overrides] == ["fc"]
    assert (spec.training.epochs, spec.training.seed, list(spec.training.milestones)) == (0, 5, [1, 2])
    assert spec.training.HasField("epochs")
    assert (spec.dataset.WhichOneof("source"), spec.dataset.format) == ("artifact", common_pb2.DATASET_FORMAT_NPZ)
    assert (list(spec.dataset.preprocessing.mean), spec.dataset.preprocessing.resize) == ([0.25], 40)
    assert spec.model == MODEL
    assert recipe.SerializeToString() == before
