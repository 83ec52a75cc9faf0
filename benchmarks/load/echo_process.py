"""A CoTrain stream's process whose generator computes nothing: what is left is the cost of the messages.

`python -m benchmarks.load.echo_process` is a generator server that runs this module for each stream.
"""

import sys
from typing import Any

import torch

from granq.v1 import common_pb2
from services.generator import joint, joint_process, sessions
from services.generator.synthesis import Batch, SynthesisParameters

_CLASSES = 1000


class Echo:
    """A synthesizer with one batch, which it draws again and again."""

    def __init__(self, shape: tuple[int, int, int], parameters: SynthesisParameters) -> None:
        self.input_shape, self.num_classes, self.parameters, self.iteration = shape, _CLASSES, parameters, 0
        size = parameters.batch_size
        self._images, self._logits = torch.randn(size, *shape), torch.randn(size, _CLASSES)
        self._labels = torch.zeros(size, dtype=torch.int64)

    def draw(self) -> Batch:
        """Return the batch."""
        return Batch(self.iteration, self._images, self._labels, self._logits, torch.zeros(()))

    def step(self, _images: torch.Tensor, _logits: torch.Tensor) -> None:
        """Count."""
        self.iteration += 1


def _create(
    model: common_pb2.ModelSource, parameters: SynthesisParameters, _store: object, _threads: int
) -> tuple[Any, dict[str, Any]]:
    channels, height, width = model.input_shape
    return Echo((channels, height, width), parameters), {}


def main() -> None:
    """Serve streams, or be one stream's process, when called with the server's process id."""
    if len(sys.argv) > 1:
        vars(joint)["create_synthesizer"] = _create
        joint_process.main()
    else:
        from services.generator.__main__ import main as serve

        sessions.PROCESS_MODULE = __spec__.name
        serve()


if __name__ == "__main__":
    main()
