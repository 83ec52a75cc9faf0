"""What the synthesis job and the joint training begin with alike."""

from typing import Any

import torch

from granq.v1 import common_pb2
from services.common.artifacts import ArtifactStore
from services.common.jobs.reading import Reading, reading_of
from services.common.models import load_model
from services.generator.synthesis import SynthesisParameters, Synthesizer


def prepare_torch(threads: int) -> torch.device:
    """Set up this process for repeatable training, and return its device: CUDA when there is a GPU."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def create_synthesizer(
    model: common_pb2.ModelSource,
    parameters: SynthesisParameters,
    store: ArtifactStore,
    threads: int,
    limits: Reading,
    *,
    bfloat16: bool = False,
) -> tuple[Synthesizer, dict[str, Any]]:
    """Load the teacher under limits and begin a training; also return what the training depends on, for its states.

    Raises:
        InvalidArgumentError: The model cannot be used.
        NotFoundError: The store does not hold it.
    """
    device = prepare_torch(threads)
    with reading_of(limits, store, "model.artifact", model.artifact):
        teacher = load_model(model, store)
    synthesizer = Synthesizer(
        teacher.module,
        teacher.input_shape,
        teacher.num_classes,
        parameters,
        device,
        teacher.pixel_range,
        bfloat16=bfloat16,
    )
    belongs_to = {
        "model": model.artifact.digest,
        "architecture": model.architecture,
        "input_shape": teacher.input_shape,
        "num_classes": teacher.num_classes,
        "batch_size": parameters.batch_size,
        "seed": parameters.seed,
        "learning_rate": parameters.learning_rate,
        "beta": parameters.beta,
        "gamma": parameters.gamma,
        "bounded": parameters.bounded,
        "normalization": [list(model.normalization.mean), list(model.normalization.std)],
    }
    return synthesizer, belongs_to
