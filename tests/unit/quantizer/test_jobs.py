"""What a job of the quantizer tells of a model that its store does not hold."""

import threading
from pathlib import Path

import pytest

from granq.v1 import artifacts_pb2, common_pb2, quantizer_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import NotFoundError
from services.common.jobs import JobContext
from services.common.logs import get_logger
from services.quantizer.jobs import quantize
from services.quantizer.settings import QuantizerSettings


def test_a_missing_model_is_told_by_field(tmp_path: Path) -> None:
    store = ArtifactStore((tmp_path / "store").as_uri())
    settings = QuantizerSettings(artifact_url=store.url, device="cpu", torch_threads=1)
    context = JobContext("job", "", store, settings, get_logger(), lambda _: None, threading.Event())
    absent = artifacts_pb2.Artifact(digest=f"sha256:{'0' * 64}")
    request = quantizer_pb2.StartQuantizeRequest(
        model=common_pb2.ModelSource(artifact=absent),
        quantization=common_pb2.QuantizationConfig(weight_bits=4, activation_bits=4),
    )
    with pytest.raises(NotFoundError) as caught:
        quantize(request, context)
    assert (caught.value.reason, caught.value.field) == ("ARTIFACT_NOT_FOUND", "model.artifact")
