"""The generator's side of joint training, message by message, in the process of one CoTrain stream."""

import math
from contextlib import nullcontext
from typing import Final

import numpy as np
import torch

from granq.v1 import common_pb2, generator_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import InvalidArgumentError
from services.common.jobs.reading import Reading, reading_of
from services.common.tensors import fill_tensor, from_tensor
from services.generator.states import Effort, load_state, save_state
from services.generator.synthesis import Batch, SynthesisParameters
from services.generator.training import create_synthesizer

# Room in a message for what is not tensor data.
_OVERHEAD: Final = 4096


class JointTraining:
    """Answers the student's messages.

    The next batch is drawn as soon as the gradients are there, while the student still makes its own step.

    Args:
        request: What the client opened with.
        store: Holds the model and the states.
        threads: CPU threads to compute with.
        max_message_bytes: Largest message that can be sent.
        limits: Under which the model and the state are read. Default: none.
        bfloat16: Whether layers compute in bfloat16.

    Raises:
        InvalidArgumentError: The model or the state cannot be used, or a batch does not fit into a message.
        NotFoundError: The store does not hold them.
    """

    def __init__(
        self,
        request: generator_pb2.CoTrainOpen,
        store: ArtifactStore,
        threads: int,
        max_message_bytes: int,
        limits: Reading = lambda _field, _size: nullcontext(),
        *,
        bfloat16: bool = False,
    ) -> None:
        self._store = store
        parameters = SynthesisParameters.of(request.generator, request.batch_size, request.seed)
        self._synthesizer, self._belongs_to = create_synthesizer(
            request.model, parameters, store, threads, limits, bfloat16=bfloat16
        )
        self._check_size(max_message_bytes)
        if request.HasField("resume_from"):
            with reading_of(limits, store, "resume_from", request.resume_from):
                load_state(store, request.resume_from, self._synthesizer, self._belongs_to)
        self._batch: Batch | None = None

    def _check_size(self, limit: int) -> None:
        made = self._synthesizer
        for_each = 4 * (math.prod(made.input_shape) + made.num_classes) + 8
        if made.parameters.batch_size * for_each + _OVERHEAD > limit:
            raise InvalidArgumentError(
                f"a batch of {made.parameters.batch_size} such images does not fit into a message of {limit} bytes; "
                f"send at most {(limit - _OVERHEAD) // for_each}, or raise max_message_bytes on both servers",
                reason="BATCH_TOO_LARGE",
                field="open.batch_size",
            )

    def draw(self) -> generator_pb2.CoTrainResponse:
        """Return the next batch."""
        batch = self._batch = self._synthesizer.draw()
        response = generator_pb2.CoTrainResponse()
        message = response.batch
        message.iteration, message.bn_loss = batch.iteration, float(batch.bn_loss)
        fill_tensor(message.images, batch.images.cpu().numpy())
        fill_tensor(message.labels, batch.labels.cpu().numpy())
        fill_tensor(message.logits, batch.logits.cpu().numpy())
        return response

    def step(self, gradients: generator_pb2.CoTrainGradients) -> None:
        """Step the generator with the student's gradients.

        Raises:
            InvalidArgumentError: They do not belong to the last batch, have other shapes, or are not finite.
        """
        batch = self._batch
        if batch is None or gradients.iteration != batch.iteration:
            expected = "none" if batch is None else str(batch.iteration)
            raise InvalidArgumentError(
                f"gradients for iteration {gradients.iteration} came where those for {expected} are due",
                reason="ITERATION_MISMATCH",
                field="gradients.iteration",
            )
        images = _gradient(gradients.images, batch.images, "gradients.images")
        logits = _gradient(gradients.logits, batch.logits, "gradients.logits")
        self._synthesizer.step(images, logits)
        self._batch = None

    def save(self) -> generator_pb2.CoTrainResponse:
        """Store the state from which the next batch is drawn, or was, when it waits for its gradients."""
        state = save_state(self._store, self._synthesizer, self._belongs_to, Effort())
        return generator_pb2.CoTrainResponse(
            saved=generator_pb2.CoTrainSaved(state=state, iteration=self._synthesizer.iteration)
        )


def _gradient(message: common_pb2.Tensor, like: torch.Tensor, field: str) -> torch.Tensor:
    array = from_tensor(message, field)
    if array.dtype != np.float32 or array.shape != tuple(like.shape):
        raise InvalidArgumentError(
            f"the gradient must be float32 of shape {tuple(like.shape)}, it is {array.dtype} of shape {array.shape}",
            reason="GRADIENT_SHAPE_MISMATCH",
            field=field,
        )
    if not np.isfinite(array).all():
        raise InvalidArgumentError(
            "the gradient holds values that are not finite: the student's training diverged",
            reason="GRADIENT_NOT_FINITE",
            field=field,
        )
    return torch.from_numpy(array)
