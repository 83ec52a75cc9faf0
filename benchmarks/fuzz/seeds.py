"""Valid inputs, of which hostile ones are made."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from granq import recipes, targets
from granq.v1 import coordinator_pb2
from tests.support import cifar_files


def state() -> dict[str, torch.Tensor]:
    """Return weights of several types."""
    return {
        "a.weight": torch.randn(4, 3),
        "a.running_var": torch.ones(4),
        "b": torch.arange(3),
        "c": torch.ones(2).half(),
    }


def saved(value: object, *, zipped: bool) -> bytes:
    """Return what torch.save makes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def npz(compressed: bool) -> bytes:
    """Return a labelled set of four images."""
    buffer = io.BytesIO()
    write = np.savez_compressed if compressed else np.savez
    write(buffer, images=np.zeros((4, 4, 4, 3), np.uint8), labels=np.arange(4))
    return buffer.getvalue()


def picture(form: str) -> bytes:
    """Return a picture in one of the formats."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


def shard() -> bytes:
    """Return a WebDataset shard of two samples."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (
            ("a.png", picture("PNG")),
            ("a.cls", b"1"),
            ("b.jpg", picture("JPEG")),
            ("b.cls", b"2"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def spec() -> bytes:
    """Return a request for a pipeline."""
    spec = recipes.load("deployable/default")
    spec.model.artifact.digest = "sha256:" + "0" * 64
    spec.engines.add().CopyFrom(targets.load("jetson-orin-nano").engine)
    return coordinator_pb2.SubmitPipelineRequest(request_id="nightly", spec=spec).SerializeToString()


def cifar(root: Path) -> bytes:
    """Return a CIFAR file of three images."""
    cifar_files.binary(root / "seed", *cifar_files.images_and_labels(3, 10), coarse=False)
    return (root / "seed").read_bytes()
