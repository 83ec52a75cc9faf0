"""Process of one CoTrain stream: `python -m services.generator.joint_process SERVER_PID`, frames on standard streams.

Each stream has a process of its own, so that a crash or exhausted memory ends that stream alone. Frames are those of
jobs: START and a REQUEST with the opening message begin, each further REQUEST carries a CoTrainRequest, each RESULT a
CoTrainResponse, and a FAILURE is the last.
"""

import os
import queue
import signal
import sys
import threading
from functools import partial
from typing import BinaryIO

from granq.v1 import generator_pb2
from services.common.artifacts import ArtifactStore
from services.common.errors import GranqError, InvalidArgumentError, to_failure
from services.common.jobs import wire
from services.common.jobs.child import die_with_parent
from services.common.jobs.reading import limited_reading
from services.common.jobs.wire import Frame, StartFrame
from services.common.logs import configure_logging, get_logger
from services.generator.settings import GeneratorSettings


class Inbox:
    """Reads the client's messages on a thread, so that one that is already there is seen without waiting."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._messages: queue.Queue[generator_pb2.CoTrainRequest | None] = queue.Queue()
        self._held: generator_pb2.CoTrainRequest | None = None
        threading.Thread(target=self._read, daemon=True, name="client").start()

    def _read(self) -> None:
        while (frame := wire.read(self._stream)) is not None:
            self._messages.put(generator_pb2.CoTrainRequest.FromString(frame[1]))
        self._messages.put(None)

    def next(self) -> generator_pb2.CoTrainRequest | None:
        """Return the next message, or None when the client sends no more."""
        if self._held is not None:
            message, self._held = self._held, None
            return message
        return self._messages.get()

    def take_save(self) -> bool:
        """Return whether the next message is already there and asks for the state; if so, it is taken."""
        if self._held is None:
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return False
            if message is None:
                self._messages.put(None)
                return False
            self._held = message
        if self._held.WhichOneof("message") != "save":
            return False
        self._held = None
        return True


def serve(opening: generator_pb2.CoTrainOpen, settings: GeneratorSettings, inbox: Inbox, outlet: BinaryIO) -> None:
    """Train until the client sends no more."""
    # torch takes seconds to import, and only this function needs it.
    from services.generator.joint import JointTraining

    def send(response: generator_pb2.CoTrainResponse) -> None:
        wire.write(outlet, Frame.RESULT, response.SerializeToString())

    store = ArtifactStore.of(settings)
    limits = partial(limited_reading, settings, lambda field: wire.write(outlet, Frame.READING, field.encode()))
    training = JointTraining(
        opening, store, settings.torch_threads, settings.max_message_bytes, limits, bfloat16=settings.bfloat16
    )
    send(training.draw())
    while (message := inbox.next()) is not None:
        match message.WhichOneof("message"):
            case "gradients":
                training.step(message.gradients)
                # Asked for in time, the state comes before the next batch; else after it, and is the same.
                if inbox.take_save():
                    send(training.save())
                send(training.draw())
            case "save":
                send(training.save())
            case _:
                raise InvalidArgumentError("only the first message of a stream may open it", field="open")


def main() -> None:
    """Serve one stream and end."""
    die_with_parent(int(sys.argv[1]))
    # The server alone decides when a stream ends, so Ctrl-C at the terminal is not for this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inlet, outlet = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What libraries print goes to the log, not between the frames.
    os.dup2(2, 1)
    first, second = wire.read(inlet), wire.read(inlet)
    if first is None or second is None:
        os._exit(1)
    start = StartFrame.model_validate_json(first[1])
    settings = GeneratorSettings.model_validate_json(start.settings_json)
    fields = {"job_id": start.job_id, "pipeline_id": start.pipeline_id, "job_kind": start.kind}
    configure_logging(settings.log_format, settings.log_level, fields)
    log = get_logger("services.generator").bind(job_id=start.job_id, pipeline_id=start.pipeline_id)
    try:
        serve(generator_pb2.CoTrainOpen.FromString(second[1]), settings, Inbox(inlet), outlet)
    except BrokenPipeError:
        # The server took the stream down; nobody is left to be told.
        log.info("joint training ended by the server")
    except BaseException as error:  # Whatever ended it, the client must hear of it.
        if isinstance(error, GranqError):
            log.warning("joint training refused", reason=error.reason, detail=error.message)
        else:
            log.exception("joint training failed")
        wire.write(outlet, Frame.FAILURE, to_failure(error).SerializeToString())
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the pipe and of torch must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main()
