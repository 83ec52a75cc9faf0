"""A job of the evaluator whose engine does harm while the runtime reads it; run in a process of its own."""

import ctypes
import sys
from typing import Any
from unittest.mock import patch

from granq.engines.machine import Gpu, Machine
from granq.v1 import common_pb2, evaluator_pb2, jobs_pb2
from services.common.jobs import JobContext
from services.evaluator import engine_model, evaluation, jobs
from tests.support.fake_engine import FakeGpu, FakeRuntime

HERE = Machine("linux-x86_64", Gpu("NVIDIA L4", "8.9"), "580.95.05", {common_pb2.RUNTIME_TENSORRT: "10.13.3.9"})


class _Runtime(FakeRuntime):
    def _load(self, plan: bytes) -> Any:
        match plan:
            case b"fills":
                bytearray(1 << 30)
            case b"crashes":
                ctypes.string_at(0)
        return super()._load(plan)


def evaluate(request: evaluator_pb2.StartEvaluateRequest, context: JobContext) -> jobs_pb2.JobResult:
    """Evaluate as on a machine with a GPU, whose runtime does what the engine's bytes name."""
    gpu = FakeGpu()
    with (
        patch.dict(sys.modules, tensorrt=_Runtime(gpu, lambda images: images)),
        patch.object(engine_model, "this_machine", lambda: HERE),
        patch.object(evaluation, "Cuda", lambda: gpu),
    ):
        return jobs.evaluate(request, context)
