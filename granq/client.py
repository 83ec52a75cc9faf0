"""Synchronous client of the coordinator."""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc

from granq.channel import open_channel
from granq.credentials import PathLike, TokenInterceptor, channel_credentials, check_plain_token, read_token
from granq.errors import from_rpc_error
from granq.transfer import Progress, Transfers
from granq.v1 import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    coordinator_pb2,
    coordinator_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
)
from granq.watching import FINAL_STATES, Watch

DEFAULT_ADDRESS = "127.0.0.1:50050"
RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class Client:
    """A connection to a coordinator. Opens on first use; a context manager; safe for use by several threads.

    Every method raises :class:`granq.GranqClientError`; its ``code`` says what happened: UNAVAILABLE (no server,
    after the retries of service_config.json), DEADLINE_EXCEEDED, INVALID_ARGUMENT (``field`` names the field),
    NOT_FOUND, FAILED_PRECONDITION and so on, as protos/granq/v1 documents for each call.

    Args:
        address: "host:port" of the coordinator.
        timeout: Deadline in seconds of each unary call. Transfers get one second more for each 64 KiB.
        credentials: Channel credentials, in place of those that the files below make.
        ca: PEM file with the authorities to trust; turns TLS on.
        certificate: PEM file with the client's own certificate chain, where the server asks for one.
        key: PEM file with its key.
        tls: TLS with the authorities that gRPC knows, without any file.
        token: Bearer token.
        token_file: File with the token, read for each call so that it may be renewed.
        patience: Seconds that :meth:`watch` and :meth:`wait` go on reconnecting while no server answers.

    Raises:
        OSError: A file cannot be read.
        ValueError: The token would be sent to another machine in plain text, or arguments do not go together.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
        ca: PathLike | None = None,
        certificate: PathLike | None = None,
        key: PathLike | None = None,
        tls: bool = False,
        token: str = "",
        token_file: PathLike | None = None,
        patience: float = 300.0,
    ) -> None:
        if token and token_file is not None:
            raise ValueError("give either token or token_file")
        self.address = address
        self._timeout, self._patience = timeout, patience
        credentials = credentials or channel_credentials(ca, certificate, key, tls)
        if token_file is not None:
            read_token(token_file)  # an error now is better than one at the first call
        show = partial(read_token, token_file) if token_file is not None else (lambda: token) if token else None
        if show is not None and credentials is None:
            check_plain_token(address)
        self._channel = open_channel(address, credentials)
        channel = self._channel if show is None else grpc.intercept_channel(self._channel, TokenInterceptor(show))
        self._pipelines = coordinator_pb2_grpc.PipelineServiceStub(channel)
        self._devices = devices_pb2_grpc.DeviceServiceStub(channel)
        self._transfers = Transfers(artifacts_pb2_grpc.ArtifactServiceStub(channel), timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight end."""
        self._channel.close()

    def upload(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        name: str = "",
        media_type: str = "",
        progress: Progress | None = None,
    ) -> artifacts_pb2.Artifact:
        """Store a file or bytes and return the artifact; content that the server holds is not sent again.

        Args:
            source: Path of a file, or its content.
            name: File name to give it. Default: that of the path.
            media_type: IANA media type.
            progress: Called with (bytes sent, bytes in all).

        Raises:
            OSError: The file cannot be read.
            GranqClientError: See the class.
        """
        return self._transfers.upload(source, name, media_type, progress)

    def stat(self, artifact: str | artifacts_pb2.Artifact) -> artifacts_pb2.Artifact:
        """Return digest and size of a stored artifact, given as such or by digest."""
        return self._transfers.stat(_digest(artifact))

    def download(
        self,
        artifact: str | artifacts_pb2.Artifact,
        path: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
    ) -> Path:
        """Write an artifact to a file and return the file's path.

        An interrupted download goes on where it stopped, also in a later call; the file appears only when its sha256
        is right.

        Args:
            artifact: The artifact or its digest.
            path: The file, or an existing folder: then the artifact's name, or its digest, is the file's name.
            progress: Called with (bytes received, bytes in all).

        Raises:
            OSError: The file cannot be written.
            GranqClientError: DATA_LOSS when the content does not match the digest; else see the class.
        """
        target = Path(path)
        if target.is_dir():
            name = "" if isinstance(artifact, str) else Path(artifact.name).name
            target /= name or _digest(artifact).removeprefix("sha256:")
        return self._transfers.download(_digest(artifact), target, progress)

    def submit(self, spec: coordinator_pb2.PipelineSpec, *, request_id: str = "") -> coordinator_pb2.Pipeline:
        """Start a pipeline.

        Args:
            spec: What to do; :func:`granq.pipeline_spec` builds it.
            request_id: Makes repeats return the first pipeline. Default: a new id for each call, which still protects
                against a repeat by the transport.
        """
        request = coordinator_pb2.SubmitPipelineRequest(request_id=request_id or uuid.uuid4().hex, spec=spec)
        return self._call(self._pipelines.SubmitPipeline, request).pipeline

    def get(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Return a pipeline as it is now."""
        request = coordinator_pb2.GetPipelineRequest(pipeline_id=pipeline_id)
        return self._call(self._pipelines.GetPipeline, request).pipeline

    def list(
        self, *, states: Sequence[coordinator_pb2.PipelineState | str] = (), page_size: int = 0
    ) -> Iterator[coordinator_pb2.Pipeline]:
        """Yield pipelines, newest first, fetching further pages as they are needed.

        Args:
            states: Only pipelines in one of these states, by value or by name. Default: all.
            page_size: Pipelines in one call, 0 to 1000. Default 0: the server's choice.
        """
        token = ""
        while True:
            request = coordinator_pb2.ListPipelinesRequest(page_size=page_size, page_token=token, states=states)
            page = self._call(self._pipelines.ListPipelines, request)
            yield from page.pipelines
            token = page.next_page_token
            if not token:
                return

    def watch(
        self, pipeline_id: str, *, after_sequence: int = 0, timeout: float | None = None
    ) -> Iterator[coordinator_pb2.WatchPipelineResponse]:
        """Yield a pipeline's events until it has ended, each once and in order, across lost connections.

        Args:
            pipeline_id: The pipeline.
            after_sequence: Events up to this number are left out.
            timeout: Seconds after which to give up with DEADLINE_EXCEEDED. Default: never.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return Watch(self._pipelines, pipeline_id, after_sequence, self._timeout, self._patience, deadline).events()

    def wait(self, pipeline_id: str, *, timeout: float | None = None) -> coordinator_pb2.Pipeline:
        """Block until a pipeline has ended and return it; ``timeout`` is as in :meth:`watch`."""
        pipeline = self.get(pipeline_id)
        if pipeline.state not in FINAL_STATES:
            for _ in self.watch(pipeline_id, after_sequence=pipeline.last_sequence, timeout=timeout):
                pass
            pipeline = self.get(pipeline_id)
        return pipeline

    def cancel(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Ask a pipeline to stop; its state is CANCELLED within seconds."""
        request = coordinator_pb2.CancelPipelineRequest(pipeline_id=pipeline_id)
        return self._call(self._pipelines.CancelPipeline, request).pipeline

    def retry(self, pipeline_id: str) -> coordinator_pb2.Pipeline:
        """Continue a FAILED or CANCELLED pipeline from the stage that failed."""
        request = coordinator_pb2.RetryPipelineRequest(pipeline_id=pipeline_id)
        return self._call(self._pipelines.RetryPipeline, request).pipeline

    def delete(self, pipeline_id: str) -> None:
        """Remove a pipeline that has ended."""
        self._call(self._pipelines.DeletePipeline, coordinator_pb2.DeletePipelineRequest(pipeline_id=pipeline_id))

    def devices(self) -> Sequence[devices_pb2.Device]:
        """Return the devices of the coordinator's pool, by id."""
        return tuple(self._call(self._devices.ListDevices, devices_pb2.ListDevicesRequest()).devices)

    def remove_device(self, device_id: str) -> None:
        """Forget a device that is gone for good; FAILED_PRECONDITION while it is there."""
        self._call(self._devices.RemoveDevice, devices_pb2.RemoveDeviceRequest(device_id=device_id))

    def _call(self, method: "grpc.UnaryUnaryMultiCallable[RequestT, ResponseT]", request: RequestT) -> ResponseT:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def _digest(artifact: str | artifacts_pb2.Artifact) -> str:
    return artifact if isinstance(artifact, str) else artifact.digest
