"""The quantizer's side of CoTrain: a batch source that talks to the generator service.

The one file of this service besides server and servicer that knows gRPC: it runs in the training process and streams
to another service.
"""

import queue
from collections.abc import Iterator

import grpc
import torch
from torch import Tensor

from granq.v1 import artifacts_pb2, common_pb2, generator_pb2, generator_pb2_grpc, jobs_pb2
from services.common.errors import InternalError, UnavailableError
from services.common.rpc.connection import blocking_channel, call_credentials
from services.common.rpc.status import status_to_error
from services.common.security import SecuritySettings
from services.common.tensors import fill_tensor, from_tensor
from services.common.tracing import outgoing
from services.quantizer.batches import Batch

CONNECT_SECONDS = 20.0


class CoTrainSource:
    """Draws batches from a generator that learns from the answers.

    Requests go through a queue, so ``answer`` returns as soon as the gradients are handed over and the student's own
    step overlaps with the generator's.

    Args:
        address: host:port of the generator.
        security: What this service shows there.
        opening: First message of the stream.
        device: Where batches are put.

    Raises (all methods):
        UnavailableError: the generator cannot be reached or went away; the training resumes from its last checkpoint.
        GranqError: what the generator refused.
    """

    wants_gradients = True

    def __init__(
        self, address: str, security: SecuritySettings, opening: generator_pb2.CoTrainOpen, device: torch.device
    ) -> None:
        unlimited: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # Where the name means several generators, trainings are spread over them; each stays with its own.
            ("grpc.lb_policy_name", "round_robin"),
        ]
        credentials = call_credentials(address, security)
        self._channel = blocking_channel(address, credentials, unlimited)
        self._requests: queue.SimpleQueue[generator_pb2.CoTrainRequest | None] = queue.SimpleQueue()
        self._early: generator_pb2.CoTrainResponse | None = None
        self._device = device
        try:
            grpc.channel_ready_future(self._channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise UnavailableError(
                f"the generator at {address} did not answer within {CONNECT_SECONDS:.0f} s; check generator_address",
                reason="GENERATOR_UNREACHABLE",
            ) from None
        self._requests.put(generator_pb2.CoTrainRequest(open=opening))
        stub = generator_pb2_grpc.GeneratorServiceStub(self._channel)
        metadata = (*credentials.metadata(), *outgoing())
        self._call = stub.CoTrain(self._outgoing(), metadata=metadata)
        self._responses: Iterator[generator_pb2.CoTrainResponse] = iter(self._call)

    def _outgoing(self) -> Iterator[generator_pb2.CoTrainRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def _receive(self, wanted: str) -> generator_pb2.CoTrainResponse:
        if wanted == "batch" and self._early is not None:
            response, self._early = self._early, None
            return response
        try:
            response = next(self._responses)
        except StopIteration:
            raise InternalError("the generator ended the joint training early", reason="CO_TRAIN_ENDED") from None
        except grpc.RpcError as error:
            raise status_to_error(error) from error
        if response.WhichOneof("message") == "batch" and wanted == "saved":
            # The next batch was on its way when the state was asked for; it waits for `next`.
            self._early = response
            return self._receive(wanted)
        if response.WhichOneof("message") != wanted:
            raise InternalError(f"the generator sent no {wanted}", reason="CO_TRAIN_OUT_OF_STEP")
        return response

    def next(self, iteration: int) -> Batch:
        """Return the generator's batch of ``iteration``."""
        batch = self._receive("batch").batch
        if batch.iteration != iteration:
            raise InternalError(
                f"the generator is at iteration {batch.iteration}, the student at {iteration}",
                reason="CO_TRAIN_OUT_OF_STEP",
            )
        images, labels, logits = (
            torch.from_numpy(from_tensor(t)).to(self._device) for t in (batch.images, batch.labels, batch.logits)
        )
        return Batch(images, labels, logits)

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        """Send the gradients of the generator's loss by the images and by the teacher's logits."""
        request = generator_pb2.CoTrainRequest()
        request.gradients.iteration = iteration
        fill_tensor(request.gradients.images, images.detach().cpu().numpy())
        fill_tensor(request.gradients.logits, logits.detach().cpu().numpy())
        self._requests.put(request)

    def save(self) -> str:
        """Return the digest of the generator's state after the last answer."""
        self._requests.put(generator_pb2.CoTrainRequest(save=generator_pb2.CoTrainSave()))
        return self._receive("saved").saved.state.digest

    def close(self) -> None:
        """End the stream; the generator forgets it."""
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()


def opening(
    model: common_pb2.ModelSource,
    generator: common_pb2.GeneratorConfig,
    batch_size: int,
    seed: int,
    key: jobs_pb2.JobKey,
    resume_from: str = "",
) -> generator_pb2.CoTrainOpen:
    """Return the first message of a stream; ``resume_from`` is a digest that ``CoTrainSource.save`` returned."""
    message = generator_pb2.CoTrainOpen(model=model, generator=generator, batch_size=batch_size, seed=seed, key=key)
    if resume_from:
        message.resume_from.CopyFrom(artifacts_pb2.Artifact(digest=resume_from))
    return message
