"""A pipeline of a few seconds: a residual network of three layers on grey images of 8×8 pixels."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import granq
from granq.v1 import coordinator_pb2
from services.common.models.cifar_resnet import CifarResNet
from tests.support.models import settle
from tests.support.pt2 import export
from tests.support.unusable_models import SHAPE

MEAN, STD = 0.5, 0.25
LABELLED = 40
EPOCH, CHECKPOINT_INTERVAL = 32, 8


def _labelled_set(model: nn.Module, path: Path) -> Path:
    """Write grey images with the model's own answers as labels, so that the float model is right about all of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (LABELLED, *SHAPE[1:]), np.uint8)
    images = torch.from_numpy((pixels[:, np.newaxis].astype(np.float32) / 255 - MEAN) / STD)
    with torch.no_grad():
        np.savez(path, images=pixels, labels=model(images).argmax(1).numpy())
    return path


def tiny_spec(client: granq.Client, folder: Path) -> coordinator_pb2.PipelineSpec:
    """Return the spec of a pipeline of seconds, with a labelled set; both files are uploaded from a folder."""
    model = settle(CifarResNet(1, 10, 1))
    labelled = client.upload(_labelled_set(model, folder / "set.npz"))
    return granq.pipeline_spec(
        granq.model_source(client.upload(export(model, SHAPE, folder / "tiny.pt2"))),
        training=granq.training_config(
            mode="co-train",
            epochs=3,
            warmup_epochs=1,
            iterations_per_epoch=EPOCH,
            batch_size=8,
            checkpoint_interval=CHECKPOINT_INTERVAL,
        ),
        synthesis=granq.synthesis_config(num_images=48, iterations=4, batch_size=8),
        dataset=granq.dataset(labelled, "npz", mean=[MEAN], std=[STD]),
    )
