"""Builders of specifications and the parsing of options."""

from pathlib import Path

import protovalidate
import pytest

import granq
from granq.cli.quantize import DatasetKind, dataset_kind, parse_numbers, parse_overrides
from granq.cli.targets import Engine, parse_engines
from granq.local.plan import SERVICES, Plan
from granq.v1 import artifacts_pb2, common_pb2, coordinator_pb2

ARTIFACT = artifacts_pb2.Artifact(digest=f"sha256:{'0' * 64}", name="model.pt2")


def full_spec() -> coordinator_pb2.PipelineSpec:
    return granq.pipeline_spec(
        granq.model_source(ARTIFACT, architecture="resnet20", input_shape=(1, 28, 28), num_classes=10),
        quantization=granq.quantization_config(4, 5, overrides={"fc": (8, None)}),
        training=granq.training_config(mode="co-train", epochs=0, schedule="STEP", milestones=(1, 2)),
        synthesis=granq.synthesis_config(num_images=8, iterations=0),
        engines=[granq.engine_target("rtx", compute_capabilities=["8.9"], batch=granq.batch_profile(1, 2, 4))],
        dataset=granq.dataset("fashion", "idx", split="t10k", pad=2, channels=3, mean=[0.286], std=[0.353], limit=9),
        display_name="example",
    )


def test_a_full_spec_satisfies_the_contract() -> None:
    spec = full_spec()
    protovalidate.validate(spec)
    assert spec.training.mode == common_pb2.TRAINING_MODE_CO_TRAIN
    assert spec.training.HasField("epochs")  # 0 is a value, not an absence
    assert not spec.training.HasField("seed")
    assert spec.quantization.overrides[0].weight_bits == 8
    assert not spec.quantization.overrides[0].HasField("activation_bits")
    assert spec.engines[0].runtime == common_pb2.RUNTIME_TENSORRT_RTX
    assert spec.dataset.WhichOneof("source") == "path"


def test_an_uploaded_dataset_is_an_artifact() -> None:
    assert granq.dataset(ARTIFACT, "npz").artifact == ARTIFACT


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mode must be one of co-train, replay, not 'fast'"):
        granq.training_config(mode="fast")


def test_overrides() -> None:
    assert parse_overrides(["layer1.0.conv1:8:4", "fc::8", "a:b:2:"]) == {
        "layer1.0.conv1": (8, 4),
        "fc": (None, 8),
        "a:b": (2, None),
    }


@pytest.mark.parametrize("text", ["fc", "fc:8", "fc::", ":8:8", "fc:x:8", "fc:-1:8"])
def test_wrong_overrides_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="LAYER:W:A"):
        parse_overrides([text])


def test_a_layer_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_overrides(["fc:8:8", "fc:4:4"])


def test_numbers() -> None:
    assert parse_numbers("1,28,28", int, "--input-shape") == [1, 28, 28]
    assert parse_numbers("", float, "--mean") == []
    with pytest.raises(ValueError, match="--mean"):
        parse_numbers("a", float, "--mean")


def test_engines() -> None:
    assert parse_engines(Engine.NONE, [], []) == []
    assert parse_engines(Engine.AUTO, [], [])[0].runtime == common_pb2.RUNTIME_UNSPECIFIED
    with pytest.raises(ValueError, match="--sm"):
        parse_engines(Engine.NONE, ["8.9"], [])


def test_dataset_format_is_taken_from_the_name_of_an_npz_only() -> None:
    assert dataset_kind("a/b.npz", None) == "npz"
    with pytest.raises(ValueError, match="--dataset-format"):
        dataset_kind("fashion", None)
    assert dataset_kind("imagenet", DatasetKind.WEBDATASET) == "webdataset"


def test_plan_gives_each_service_its_own_ports_and_the_addresses_it_needs() -> None:
    plan = Plan(Path("/data"), Path("/sets"), port=6000)
    ports = [port for service in SERVICES for port in plan.ports(service)]
    assert len(set(ports)) == len(ports)
    quantizer = next(s for s in SERVICES if s.name == "quantizer")
    environment = plan.environment(quantizer, (6002, 7002), {"generator": "127.0.0.1:6001"})
    assert environment["GRANQ_GENERATOR_ADDRESS"] == "127.0.0.1:6001"
    assert environment["GRANQ_ARTIFACT_URL"] == "file:///data/artifacts"
    assert environment["GRANQ_DATASET_ROOT"] == "/sets"
    assert "GRANQ_DATABASE_URL" not in environment
    assert Plan(Path("/data"), Path("/sets"), port=0).ports(quantizer) == (0, 0)
