"""Bookkeeping of one RPC: its metrics, its log line, and the status that its end becomes."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog

from services.common.errors import ResourceExhaustedError, as_granq_error
from services.common.logs import get_logger
from services.common.metrics import MethodMetrics
from services.common.principal import Principal
from services.common.rpc import audit
from services.common.rpc.rules import rule_of
from services.common.rpc.status import DETAILS_KEY, status_code, to_status
from services.common.rpc.validation import validate
from services.common.tracing import begin_rpc

Context = grpc.aio.ServicerContext[Any, Any]

_log = get_logger("services.common.rpc")
# Probes come every few seconds and say nothing.
_QUIET = ("/grpc.health.", "/grpc.reflection.")
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


class Call:
    """One RPC, from its arrival to its status.

    Args:
        figures: Name and metrics of its method.
        context: The RPC's context.
        max_messages: Messages that the caller may send.

    Attributes:
        code: Its status, once the block of `observed` has been left.
        rule: Who may make it.
    """

    def __init__(self, figures: MethodMetrics, context: Context, max_messages: int) -> None:
        self.figures = figures
        self.method = figures.name
        self.code = grpc.StatusCode.OK
        self.rule = rule_of(self.method)
        self.request_id = uuid.uuid4().hex[:16]
        self._context = context
        # Read now: once the peer is gone, gRPC frees what peer() and time_remaining() look at, and a handler that is
        # still being taken down would crash the whole server there.
        self._peer = context.peer()
        remaining = context.time_remaining()
        self._deadline = None if remaining is None else time.monotonic() + remaining
        self._max_messages = max_messages
        self._messages = 0
        self._principal = ""
        self._target = ""

    def metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """Return the metadata that the caller sent."""
        return self._context.invocation_metadata() or ()

    def certificate(self) -> Mapping[str, Iterable[bytes]]:
        """Return what TLS knows of the caller."""
        return self._context.auth_context()

    def belongs_to(self, principal: Principal) -> None:
        """Note who calls, for the logs."""
        self._principal = principal.name
        if principal.name:
            structlog.contextvars.bind_contextvars(principal=principal.name)

    def accept(self, message: Any) -> Any:
        """Return a received message if it obeys the contract's rules, and let the log carry the job that it names.

        Raises:
            RequestInvalidError: It does not.
            ResourceExhaustedError: It is one more than the caller may send.
        """
        self.figures.received.inc()
        self._messages += 1
        if self._messages > self._max_messages:
            raise ResourceExhaustedError(
                f"a stream may carry up to {self._max_messages} messages here; send larger or fewer ones",
                reason="STREAM_TOO_LONG",
            )
        validate(message)
        if self.rule.mutates:
            self._target = self._target or audit.target_of(message)
        # The contract names a job in the request itself, in its key, or in the key of what opens a stream.
        for holder in (message, getattr(message, "key", None), getattr(getattr(message, "open", None), "key", None)):
            for name in ("job_id", "pipeline_id"):
                value = getattr(holder, name, "")
                if isinstance(value, str) and value:
                    structlog.contextvars.bind_contextvars(**{name: value})
        return message

    def answered(self, response: Any) -> None:
        """Note what the call was about where its request could not know, such as the id of what it made."""
        if self.rule.mutates:
            self._target = self._target or audit.target_of(response)

    @asynccontextmanager
    async def observed(self) -> AsyncIterator[None]:
        """Around the handler: turn what it raises into a status, then count and log the end."""
        began = self.figures.begin()
        span = None if self.method.startswith(_QUIET) else begin_rpc(self.method, self._context.invocation_metadata())
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=self.request_id)
        try:
            yield
            self.code = self._code_set(grpc.StatusCode.OK)
        except grpc.aio.AbortError:
            # The handler ended the call itself.
            self.code = self._code_set(grpc.StatusCode.UNKNOWN)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            late = self._deadline is not None and time.monotonic() >= self._deadline
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            status = to_status(error, self.request_id)
            self.code = status_code(status)
            if as_granq_error(error) is None or self.code is grpc.StatusCode.INTERNAL:
                _log.exception("rpc failed by a defect", method=self.method)
            else:
                _log.warning("rpc refused", method=self.method, code=self.code.name, error=str(error))
            await self._context.abort(self.code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
        finally:
            exemplar = None if span is None else span.end(self.code.name)
            seconds = self.figures.end(began, self.code.name, exemplar)
            log = _log.debug if self.method.startswith(_QUIET) else _log.info
            if self.rule.mutates:
                audit.record(self._principal, self.method, self._target, self.code, self._peer)
            log("rpc", method=self.method, code=self.code.name, seconds=round(seconds, 4), peer=self._peer)

    def _code_set(self, default: grpc.StatusCode) -> grpc.StatusCode:
        """Return the code that the handler set in its context; gRPC keeps it as a code or as its number."""
        code: object = self._context.code()
        if isinstance(code, grpc.StatusCode):
            return code
        # 0 is also what an untouched context has.
        return _BY_NUMBER.get(code, default) if isinstance(code, int) and code else default
