"""Joint training through a real server is the single-process training, step by step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

from granq.v1 import common_pb2, generator_pb2, generator_pb2_grpc, jobs_pb2
from services.common.artifacts import ArtifactStore
from services.common.models import load_model
from services.common.rpc import GrpcServer
from services.common.tensors import from_tensor, to_tensor
from services.generator.synthesis import SynthesisParameters, Synthesizer
from tests.support.waiting import eventually, is_gone

BATCH = 4
Request = generator_pb2.CoTrainRequest
# The stubs of grpc lack both.
EOF: Any = getattr(grpc.aio, "EOF")  # noqa: B009


def _co_train(channel: grpc.aio.Channel) -> Any:
    stub: Any = generator_pb2_grpc.GeneratorServiceStub(channel)
    return stub.CoTrain()


class Student(nn.Module):
    """A tiny student with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        rng = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.2
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)

    def generator_loss(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        s = self.net(x)
        return 0.2 * F.cross_entropy(t - s, y) + 0.1 * F.cross_entropy(t + s, y)

    def learn(self, x: torch.Tensor, t: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        F.mse_loss(self.net(x), t).backward()
        self.optimizer.step()


class Client:
    """The student's side of one stream."""

    def __init__(self, call: Any, student: Student) -> None:
        self.call = call
        self.student = student
        self.saved: generator_pb2.CoTrainSaved | None = None
        self.iterations: list[int] = []
        self.bn_losses: list[float] = []

    async def receive(self) -> generator_pb2.CoTrainBatch:
        while True:
            response = await self.call.read()
            assert response is not EOF, await self.call.details()
            if response.HasField("batch"):
                return response.batch  # type: ignore[no-any-return]
            self.saved = response.saved

    async def step(self) -> None:
        batch = await self.receive()
        self.iterations.append(batch.iteration)
        self.bn_losses.append(batch.bn_loss)
        x, y, t = (torch.from_numpy(from_tensor(m)) for m in (batch.images, batch.labels, batch.logits))
        gx, gt = gradients(self.student, x, t, y)
        await self.call.write(
            Request(
                gradients=generator_pb2.CoTrainGradients(
                    iteration=batch.iteration, images=to_tensor(gx.numpy()), logits=to_tensor(gt.numpy())
                )
            )
        )
        self.student.learn(x, t)

    async def save(self) -> generator_pb2.CoTrainSaved:
        await self.call.write(Request(save=generator_pb2.CoTrainSave()))
        await self.call.done_writing()
        while self.saved is None:
            response = await self.call.read()
            assert response is not EOF
            if response.HasField("saved"):
                self.saved = response.saved
        return self.saved


def gradients(student: Student, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    gx, gt = torch.autograd.grad(student.generator_loss(x, t, y), [x, t])
    return gx, gt


def opening(model: common_pb2.ModelSource, **fields: Any) -> generator_pb2.CoTrainOpen:
    key = jobs_pb2.JobKey(job_id="job-1", pipeline_id="pipeline-1")
    return generator_pb2.CoTrainOpen(model=model, batch_size=BATCH, seed=11, key=key, **fields)


@asynccontextmanager
async def stream(server: GrpcServer, first: generator_pb2.CoTrainOpen) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = _co_train(channel)
        await call.write(Request(open=first))
        yield call
        call.cancel()


async def train(server: GrpcServer, first: generator_pb2.CoTrainOpen, student: Student, steps: int) -> Client:
    async with stream(server, first) as call:
        client = Client(call, student)
        for _ in range(steps):
            await client.step()
        await client.save()
    return client


async def test_equals_a_single_process(server: GrpcServer, model: common_pb2.ModelSource, store: ArtifactStore) -> None:
    client = await train(server, opening(model), Student(), 20)

    teacher = load_model(model, store)
    parameters = SynthesisParameters(batch_size=BATCH, seed=11)
    reference = Synthesizer(teacher.module, teacher.input_shape, teacher.num_classes, parameters, torch.device("cpu"))
    student = Student()
    for step in range(20):
        batch = reference.draw()
        assert client.bn_losses[step] == pytest.approx(float(batch.bn_loss), abs=1e-6)
        pending = reference._pending
        assert pending is not None
        # One graph from the student's loss through images and teacher into the generator, as one process would have it.
        # The student gets images N×C×H×W in memory, as a message has them, for convolutions to add in the same order.
        student.requires_grad_(False)
        loss = student.generator_loss(pending.images.contiguous(), pending.logits, pending.labels) + pending.bn_loss
        reference._optimizer.zero_grad()
        loss.backward()
        student.requires_grad_(True)
        reference._optimizer.step()
        reference._pending, reference.iteration = None, step + 1
        student.learn(batch.images.contiguous(), batch.logits)

    assert client.iterations == list(range(20))
    for mine, theirs in zip(client.student.parameters(), student.parameters(), strict=True):
        assert float((mine - theirs).detach().abs().max()) <= 1e-6
    assert client.saved is not None
    assert client.saved.iteration == 20
    state = load(store.read_bytes(client.saved.state.digest))
    for name, tensor in reference.generator.named_parameters():
        assert float((state[f"generator.{name}"] - tensor.detach()).abs().max()) <= 1e-6, name


async def test_resumes_bit_for_bit(server: GrpcServer, model: common_pb2.ModelSource) -> None:
    undisturbed = await train(server, opening(model), Student(), 8)
    student = Student()
    first = await train(server, opening(model), student, 5)
    assert first.saved is not None
    second = await train(server, opening(model, resume_from=first.saved.state), student, 3)
    assert undisturbed.saved is not None
    assert second.saved is not None
    assert second.iterations == [5, 6, 7]
    assert second.saved.state.digest == undisturbed.saved.state.digest
    for mine, theirs in zip(student.parameters(), undisturbed.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def _children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "services.generator.joint_process" in " ".join(p.cmdline())]


async def test_cancel_ends_the_process_and_frees_the_place(server: GrpcServer, model: common_pb2.ModelSource) -> None:
    async with stream(server, opening(model)) as call:
        await Client(call, Student()).step()
        (child,) = _children()
        async with stream(server, opening(model)) as second:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await second.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server._jobs is not None
        with pytest.raises(TimeoutError):  # though it has no job
            await asyncio.wait_for(server._jobs.retire(0), 0.2)
    await eventually(lambda: is_gone(child.pid), 5)
    async with stream(server, opening(model)) as call:
        await Client(call, Student()).step()


async def test_death_of_the_process_is_unavailable(server: GrpcServer, model: common_pb2.ModelSource) -> None:
    async with stream(server, opening(model)) as call:
        client = Client(call, Student())
        await client.step()
        (child,) = _children()
        child.kill()
        error = await _end(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def _end(call: Any) -> grpc.aio.AioRpcError:
    """Read on until the stream fails."""
    try:
        while await call.read() is not EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


async def _failure(server: GrpcServer, *requests: Request) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = _co_train(channel)
        for request in requests:
            await call.write(request)
        return await _end(call)


async def test_wrong_messages_are_refused(server: GrpcServer, model: common_pb2.ModelSource) -> None:
    unknown = common_pb2.ModelSource(artifact=model.artifact, architecture="resnet21", input_shape=(3, 8, 8))
    first = Request(open=opening(model))
    for requests, words in (
        ((Request(save=generator_pb2.CoTrainSave()),), "first message"),
        ((first, first), "first message"),
        ((Request(open=opening(unknown)),), "resnet21"),
    ):
        error = await _failure(server, *requests)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (error.details() or "")
