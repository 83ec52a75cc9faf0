"""Frames between a server and the process of one job, over the process's standard input and output.

A frame is one byte for its kind, four for the length of its payload (big-endian), and the payload.
"""

import asyncio
import struct
from enum import Enum
from typing import BinaryIO

from pydantic import BaseModel

_HEAD = struct.Struct(">cI")


class Frame(Enum):
    """What a frame carries, and who sends it."""

    START = b"S"
    """To the job, first: a `StartFrame` in JSON."""
    REQUEST = b"Q"
    """To the job, second: the request, serialized."""
    CANCEL = b"X"
    """To the job: stop at the next check."""
    PROGRESS = b"P"
    """From the job: granq.v1.Progress."""
    SUMS = b"B"
    """From the job: what it counted since the last such frame, as `metrics.Sums` in JSON."""
    READING = b"G"
    """From the job: the request's field whose file it reads from now on; empty when it has read it."""
    RESULT = b"R"
    """From the job, last: granq.v1.JobResult."""
    FAILURE = b"F"
    """From the job, last: granq.v1.Failure."""


ENDS = (Frame.RESULT, Frame.FAILURE)


class StartFrame(BaseModel):
    """What a job's process must know to begin."""

    job_id: str
    pipeline_id: str
    kind: str
    function: str
    """Dotted path such as "services.quantizer.jobs:quantize"."""
    request: str
    """Dotted path of the request's class."""
    settings: str
    """Dotted path of the settings' class."""
    run_id: str = ""
    """Run of the job, which owns its lease."""
    settings_json: str
    """The settings, so that the process need not read the environment again."""
    trace: dict[str, str] = {}
    """What `tracing.handover` gave."""


def encode(kind: Frame, payload: bytes = b"") -> bytes:
    """Return a frame's bytes."""
    return _HEAD.pack(kind.value, len(payload)) + payload


def write(stream: BinaryIO, kind: Frame, payload: bytes) -> None:
    """Send one frame; unlike `encode`, without a copy of the payload."""
    stream.write(_HEAD.pack(kind.value, len(payload)))
    stream.write(payload)
    stream.flush()


def read(stream: BinaryIO) -> tuple[Frame, bytes] | None:
    """Wait for the next frame; None when the other side is gone."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, length = _HEAD.unpack(head)
    payload = stream.read(length)
    return (Frame(kind), payload) if len(payload) == length else None


async def read_async(stream: asyncio.StreamReader) -> tuple[Frame, bytes] | None:
    """As `read`, for the server."""
    try:
        kind, length = _HEAD.unpack(await stream.readexactly(_HEAD.size))
        return Frame(kind), await stream.readexactly(length)
    except asyncio.IncompleteReadError:
        return None
