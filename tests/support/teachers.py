"""Tiny teachers as model artifacts, for the generator's and the quantizer's tests."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from granq.v1 import common_pb2
from services.common.artifacts import ArtifactStore
from services.common.models.cifar_resnet import resnet20
from tests.support.models import settle


def teacher(store: ArtifactStore, folder: Path, size: int = 8, num_classes: int = 5) -> common_pb2.ModelSource:
    """Store a ResNet-20 with drawn weights for 3×size×size images."""
    model = settle(resnet20(num_classes=num_classes))
    save_file({name: tensor.to(torch.float32) for name, tensor in model.state_dict().items()}, folder / "teacher")
    artifact = store.put_file(folder / "teacher")
    return common_pb2.ModelSource(artifact=artifact, architecture="resnet20", input_shape=(3, size, size))
