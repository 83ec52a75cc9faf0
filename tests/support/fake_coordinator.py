"""A coordinator for tests of the client: real gRPC in this process, faults on demand, no pipeline behind it."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from granq.v1 import artifacts_pb2, artifacts_pb2_grpc, coordinator_pb2, coordinator_pb2_grpc, reports_pb2

CHUNK = 64 * 1024
S = coordinator_pb2


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def refuse(context: Any, code: grpc.StatusCode, message: str, reason: str, field: str = "") -> None:
    """Abort with google.rpc details, as the project's servers do."""
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="granq"))
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    context.abort_with_status(rpc_status.to_status(status))


def bundle(files: dict[str, bytes]) -> bytes:
    """Return a zip file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


class FakeCoordinator(coordinator_pb2_grpc.PipelineServiceServicer, artifacts_pb2_grpc.ArtifactServiceServicer):
    """Both public services over dictionaries.

    Attributes:
        blobs: Stored content by digest.
        pipelines: Pipelines by id; their events are in ``events``.
        break_after: Numbers of events after which successive watch calls break; None for a call that ends politely.
        break_downloads: For successive downloads, chunks after which they break.
        corrupt: Digests whose content is sent with its first byte changed.
        unavailable: Unary calls still to be answered UNAVAILABLE.
        calls: Names of the methods called, in order.
        deadlines: Seconds that the client gave the last call of each method.
        after_submit: What a submitted pipeline turns into.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.pipelines: dict[str, S.Pipeline] = {}
        self.events: dict[str, list[S.WatchPipelineResponse]] = {}
        self.requests: dict[str, str] = {}
        self.break_after: list[int | None] = []
        self.break_downloads: list[int] = []
        self.corrupt: set[str] = set()
        self.unavailable = 0
        self.calls: list[str] = []
        self.deadlines: dict[str, float | None] = {}
        self.offsets: list[int] = []
        self.after_submit: Callable[[S.Pipeline], None] = self.succeed

    def add(self, pipeline_id: str, events: int = 5, state: S.PipelineState = S.PIPELINE_STATE_SUCCEEDED) -> S.Pipeline:
        """Add a pipeline that ended after so many events."""
        pipeline = S.Pipeline(pipeline_id=pipeline_id, state=state, stage=S.STAGE_QUANTIZE, last_sequence=events)
        self.pipelines[pipeline_id] = pipeline
        self.events[pipeline_id] = [
            S.WatchPipelineResponse(sequence=n, state=S.PIPELINE_STATE_RUNNING, stage=S.STAGE_QUANTIZE)
            for n in range(1, events + 1)
        ]
        for number, event in enumerate(self.events[pipeline_id], 1):
            event.progress.step, event.progress.total, event.progress.phase = number, events, "training"
            event.progress.metrics["loss_student"] = 1.0 / number
        if self.events[pipeline_id]:
            self.events[pipeline_id][-1].state = state
        return pipeline

    def succeed(self, pipeline: S.Pipeline) -> None:
        """Give a pipeline the results of a finished one."""
        pipeline.state = S.PIPELINE_STATE_SUCCEEDED
        results = pipeline.results
        figures = {
            reports_pb2.MEASURED_FORM_FLOAT: 93.5,
            reports_pb2.MEASURED_FORM_SIMULATED: 92.75,
            reports_pb2.MEASURED_FORM_ONNX_TRT: 92.5,
            reports_pb2.MEASURED_FORM_ONNX_ORT: 92.25,
        }
        for form, top1 in figures.items():
            measurement = results.evaluation.measurements.add(form=form, runtime="onnxruntime 1.0")
            measurement.accuracy.images, measurement.accuracy.top1 = 100, top1
        results.evaluation.dataset = "fashion"
        outcome = results.engines.add()
        outcome.failure.message, outcome.failure.reason = "no TensorRT here: install granq-pipeline[rtx]", "NO_RUNTIME"
        files = {"report.json": json.dumps({"top1": 92.5}).encode(), "graphs/model.trt.onnx": b"graph"}
        for field, content in ((results.report, files["report.json"]), (results.bundle, bundle(files))):
            field.digest, field.size_bytes = digest_of(content), len(content)
            self.blobs[field.digest] = content

    def _enter(self, name: str, context: Any) -> None:
        self.calls.append(name)
        self.deadlines[name] = context.time_remaining()
        if self.unavailable > 0:
            self.unavailable -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    def _find(self, pipeline_id: str, context: Any) -> S.Pipeline:
        if pipeline_id not in self.pipelines:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"no pipeline {pipeline_id}", "PIPELINE_NOT_FOUND")
        return self.pipelines[pipeline_id]

    def SubmitPipeline(self, request: S.SubmitPipelineRequest, context: Any) -> S.SubmitPipelineResponse:  # noqa: N802
        self._enter("SubmitPipeline", context)
        if request.spec.quantization.weight_bits not in range(2, 9):
            field = "spec.quantization.weight_bits"
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "must be 2 to 8", "INVALID_ARGUMENT", field)
        if request.request_id not in self.requests:
            pipeline = self.add(f"p{len(self.pipelines) + 1}")
            pipeline.spec.CopyFrom(request.spec)
            self.after_submit(pipeline)
            self.events[pipeline.pipeline_id][-1].state = pipeline.state
            self.requests[request.request_id] = pipeline.pipeline_id
        return S.SubmitPipelineResponse(pipeline=self.pipelines[self.requests[request.request_id]])

    def GetPipeline(self, request: S.GetPipelineRequest, context: Any) -> S.GetPipelineResponse:  # noqa: N802
        self._enter("GetPipeline", context)
        return S.GetPipelineResponse(pipeline=self._find(request.pipeline_id, context))

    def ListPipelines(self, request: S.ListPipelinesRequest, context: Any) -> S.ListPipelinesResponse:  # noqa: N802
        self._enter("ListPipelines", context)
        found = [p for p in self.pipelines.values() if not request.states or p.state in request.states][::-1]
        begin, size = int(request.page_token or 0), request.page_size or 2
        token = str(begin + size) if begin + size < len(found) else ""
        return S.ListPipelinesResponse(pipelines=found[begin : begin + size], next_page_token=token)

    def WatchPipeline(  # noqa: N802
        self, request: S.WatchPipelineRequest, context: Any
    ) -> Iterator[S.WatchPipelineResponse]:
        self._enter("WatchPipeline", context)
        self._find(request.pipeline_id, context)
        limit = self.break_after.pop(0) if self.break_after else -1
        for event in self.events[request.pipeline_id]:
            if event.sequence <= request.after_sequence:
                continue
            if limit is not None and event.sequence > limit >= 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            if limit is None and event.sequence > request.after_sequence + 1:
                return
            yield event

    def CancelPipeline(self, request: S.CancelPipelineRequest, context: Any) -> S.CancelPipelineResponse:  # noqa: N802
        self._enter("CancelPipeline", context)
        pipeline = self._find(request.pipeline_id, context)
        pipeline.state = S.PIPELINE_STATE_CANCELLED
        return S.CancelPipelineResponse(pipeline=pipeline)

    def RetryPipeline(self, request: S.RetryPipelineRequest, context: Any) -> S.RetryPipelineResponse:  # noqa: N802
        self._enter("RetryPipeline", context)
        pipeline = self._find(request.pipeline_id, context)
        if pipeline.state == S.PIPELINE_STATE_SUCCEEDED:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "it has succeeded", "PIPELINE_SUCCEEDED")
        pipeline.state = S.PIPELINE_STATE_QUEUED
        return S.RetryPipelineResponse(pipeline=pipeline)

    def DeletePipeline(self, request: S.DeletePipelineRequest, context: Any) -> S.DeletePipelineResponse:  # noqa: N802
        self._enter("DeletePipeline", context)
        del self.pipelines[self._find(request.pipeline_id, context).pipeline_id]
        return S.DeletePipelineResponse()

    def UploadArtifact(self, request_iterator: Any, context: Any) -> artifacts_pb2.UploadArtifactResponse:  # noqa: N802
        self._enter("UploadArtifact", context)
        header = next(request_iterator).header
        content = b"".join(message.chunk for message in request_iterator)
        assert digest_of(content) == header.digest
        assert len(content) == header.size_bytes
        self.blobs[header.digest] = content
        artifact = artifacts_pb2.Artifact(digest=header.digest, size_bytes=len(content), name=header.name)
        return artifacts_pb2.UploadArtifactResponse(artifact=artifact)

    def DownloadArtifact(  # noqa: N802
        self, request: artifacts_pb2.DownloadArtifactRequest, context: Any
    ) -> Iterator[artifacts_pb2.DownloadArtifactResponse]:
        self._enter("DownloadArtifact", context)
        self.offsets.append(request.offset)
        content = self.blobs[request.digest]
        if request.digest in self.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        limit = self.break_downloads.pop(0) if self.break_downloads else -1
        for count, begin in enumerate(range(request.offset, len(content), CHUNK)):
            if count == limit:
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            chunk = content[begin : begin + CHUNK]
            yield artifacts_pb2.DownloadArtifactResponse(size_bytes=len(content), chunk=chunk)

    def GetArtifact(  # noqa: N802
        self, request: artifacts_pb2.GetArtifactRequest, context: Any
    ) -> artifacts_pb2.GetArtifactResponse:
        self._enter("GetArtifact", context)
        if request.digest not in self.blobs:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"no artifact {request.digest}", "ARTIFACT_NOT_FOUND")
        artifact = artifacts_pb2.Artifact(digest=request.digest, size_bytes=len(self.blobs[request.digest]))
        return artifacts_pb2.GetArtifactResponse(artifact=artifact)


@contextmanager
def serve(fake: FakeCoordinator, address: str = "127.0.0.1:0") -> Iterator[str]:
    """Serve until the end of the block; yields the address."""
    server = grpc.server(ThreadPoolExecutor(4))
    coordinator_pb2_grpc.add_PipelineServiceServicer_to_server(fake, server)
    artifacts_pb2_grpc.add_ArtifactServiceServicer_to_server(fake, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
