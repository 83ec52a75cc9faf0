"""Further ranks of a training: begun by the job's process, which is rank 0, and ended with it.

`python -m services.quantizer.rank_process JOB_PID`, frames on standard input. Ranks meet in a store of
torch.distributed on loopback, as under torchrun; its launcher is left out because it would stand between the server
and the process that it watches, cancels and kills.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
import torch.distributed as dist
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from granq.v1 import quantizer_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import FailedPreconditionError, InternalError, InvalidArgumentError, UnavailableError
from services.common.jobs import JobContext, wire
from services.common.jobs.child import die_with_parent, listen
from services.common.jobs.wire import Frame
from services.common.logs import configure_logging
from services.common.models.loading import load_model
from services.quantizer.batches import Batch
from services.quantizer.config import GeneratorLosses, Quantization, Training
from services.quantizer.ranks import ProcessGroup, Ranks
from services.quantizer.settings import QuantizerSettings
from services.quantizer.student import build_student, no_grad_copy
from services.quantizer.training import Trainer

# A rank that waits longer for the others than this gives up: none of them works so long between two messages.
_PATIENCE: Final = timedelta(minutes=5)
_LEAVE_SECONDS: Final = 5.0


class RankStart(BaseModel):
    """What a rank must know to begin, beside the request."""

    rank: int
    size: int
    port: int
    settings_json: str
    state: Path
    """safetensors file of the trainer's state."""
    iteration: int
    log_fields: dict[str, str]


class _Received:
    """Source of a rank that is not the first: the batches come from there, and the answers are given there."""

    def __init__(self, wants_gradients: bool) -> None:
        self.wants_gradients = wants_gradients

    def next(self, iteration: int) -> Batch:
        raise RuntimeError("only rank 0 draws batches")

    def answer(self, iteration: int, images: Tensor, logits: Tensor) -> None:
        """Leave the answer to rank 0."""

    def save(self) -> str:
        return ""

    def close(self) -> None:
        """Hold nothing."""


def device_of(rank: int, size: int, device: torch.device) -> torch.device:
    """Return where a rank computes, and share out the processor's cores.

    Raises:
        FailedPreconditionError: there are fewer GPUs than ranks, or one was chosen for all.
    """
    if size == 1:
        return device
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
        return device
    if device.index is not None or torch.cuda.device_count() < size:
        raise FailedPreconditionError(
            f"{size} ranks need as many GPUs; there are {torch.cuda.device_count()}, and device is {str(device)!r}: "
            "lower ranks, or set device to cuda",
            reason="TOO_FEW_DEVICES",
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _join(store: Store, rank: int, size: int, device: torch.device) -> ProcessGroup:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    return ProcessGroup(device)


@contextmanager
def further_ranks(
    trainer: Trainer, request: quantizer_pb2.StartQuantizeRequest, context: JobContext, device: torch.device
) -> Iterator[None]:
    """Have the other ranks of ``context.settings.ranks`` train along with ``trainer`` within the block.

    Raises:
        InvalidArgumentError: a batch has fewer images than there are ranks.
        UnavailableError: another rank ended; the training resumes from its last checkpoint.
    """
    size = context.settings.ranks
    if size == 1:
        yield
        return
    if trainer.training.batch_size < size:
        raise InvalidArgumentError(
            f"a batch of {trainer.training.batch_size} leaves some of {size} ranks without an image; raise batch_size",
            reason="BATCH_TOO_SMALL",
            field="training.batch_size",
        )
    store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
    helpers: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory() as folder:
        state = Path(folder, "state.safetensors")
        save_file({name: value.detach().cpu().contiguous() for name, value in trainer.state().items()}, state)
        try:
            for rank in range(1, size):
                start = RankStart(
                    rank=rank,
                    size=size,
                    port=store.port,
                    settings_json=context.settings.model_dump_json(),
                    state=state,
                    iteration=trainer.iteration,
                    log_fields={"job_id": context.job_id, "pipeline_id": context.pipeline_id, "rank": str(rank)},
                )
                helpers.append(_spawn(start, request))
            _await_ready(store, helpers, context)
            trainer.join(_join(store, 0, size, device))
            yield
            trainer.join(Ranks())
        except RuntimeError as error:
            # A rank that died takes the connections to it down; which one it was, its process tells.
            death = _death(helpers)
            if death is None:
                raise
            raise death from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for helper in helpers:
                _end(helper)


def _spawn(start: RankStart, request: quantizer_pb2.StartQuantizeRequest) -> "subprocess.Popen[bytes]":
    # In the job's process group, so that whoever ends the job ends its ranks.
    command = [sys.executable, "-P", "-m", "services.quantizer.rank_process", str(os.getpid())]
    helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr)  # noqa: S603
    if helper.stdin is None:
        raise InternalError("a rank has no standard input")
    helper.stdin.write(wire.encode(Frame.START, start.model_dump_json().encode()))
    helper.stdin.write(wire.encode(Frame.REQUEST, request.SerializeToString()))
    helper.stdin.flush()
    return helper


def _await_ready(store: Store, helpers: "list[subprocess.Popen[bytes]]", context: JobContext) -> None:
    """Wait until all ranks have loaded; after that they only meet."""
    context.report("starting ranks")
    for rank, helper in enumerate(helpers, start=1):
        while not store.check([f"ready{rank}"]):
            context.check_cancelled()
            try:
                helper.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"rank {rank} ended before the training began")


def _death(helpers: "list[subprocess.Popen[bytes]]") -> UnavailableError | None:
    """Return the error that names the rank that ended first, or None where all of them run."""
    deadline = time.monotonic() + _LEAVE_SECONDS
    while time.monotonic() < deadline:
        for rank, helper in enumerate(helpers, start=1):
            code = helper.poll()
            # A rank that lost another one leaves with 1, and is not the cause.
            if code is None or (code == 1 and any(other.poll() not in (None, 1) for other in helpers)):
                continue
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            return UnavailableError(
                f"rank {rank} of {len(helpers) + 1} {how}; start the job again to go on from its last checkpoint",
                reason="RANK_DIED",
            )
        with suppress(subprocess.TimeoutExpired):
            helpers[0].wait(timeout=0.05)
    return None


def _end(helper: "subprocess.Popen[bytes]") -> None:
    if helper.stdin is not None:
        helper.stdin.close()  # its sign to leave
    try:
        helper.wait(timeout=_LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        helper.kill()
        helper.wait()


def train(start: RankStart, request: quantizer_pb2.StartQuantizeRequest) -> None:
    """Train along until the last iteration."""
    # jobs imports this module.
    from services.quantizer.jobs import prepare

    settings = QuantizerSettings.model_validate_json(start.settings_json)
    configure_logging(settings.log_format, settings.log_level, start.log_fields)
    device = device_of(start.rank, start.size, prepare(settings))
    quantization = Quantization.from_proto(request.quantization)
    training = Training.from_proto(request.training).for_family(quantization)
    model = load_model(request.model, ArtifactStore.of(settings))
    student = build_student(model.module, quantization, model.pixel_range).to(device)
    teacher = no_grad_copy(model.module).to(device) if training.feature_weight else None
    source = _Received(bool(training.co_train))
    narrow = settings.bfloat16 and not quantization.deployable
    losses = GeneratorLosses.from_proto(request.generator)
    trainer = Trainer(student, training, losses, source, teacher, bfloat16=narrow)
    trainer.load_state(load_file(start.state), start.iteration)
    store = TCPStore("127.0.0.1", start.port, start.size, is_master=False, timeout=_PATIENCE)
    store.set(f"ready{start.rank}", "")
    trainer.join(_join(store, start.rank, start.size, device))
    while trainer.iteration < training.iterations:
        trainer.step()
    dist.destroy_process_group()


def main() -> None:
    """Be one rank and end."""
    die_with_parent(int(sys.argv[1]))
    # The server alone decides when a job ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inlet = os.fdopen(os.dup(0), "rb")
    first, second = wire.read(inlet), wire.read(inlet)
    if first is None or second is None:
        os._exit(1)
    threading.Thread(target=listen, args=(inlet, threading.Event()), daemon=True, name="rank 0").start()
    train(RankStart.model_validate_json(first[1]), quantizer_pb2.StartQuantizeRequest.FromString(second[1]))
    sys.stderr.flush()
    # Threads of torch.distributed must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main()
