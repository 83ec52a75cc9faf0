"""The interceptor of all servers: lets calls in, validates them, and turns what is raised into statuses and logs.

It wraps the handler's iteration, not only its call, so that errors in the midst of a stream are told as well. To gRPC
every method is one whose requests stream: so a request is read, and its bytes are parsed, only after its caller was let
in.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from services.common.errors import InvalidArgumentError
from services.common.metrics import MethodMetrics, count_unknown_method
from services.common.rpc.blocking import in_thread, is_plain, iterate_in_thread
from services.common.rpc.call import Call, Context
from services.common.rpc.gate import Gate


class _WatchedContext:
    """A context that counts, and whose `read` gives valid messages only, for handlers that do not use iterators."""

    def __init__(self, context: Context, call: Call) -> None:
        self._context = context
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        with _parsing():
            message = await self._context.read()
        return message if message is grpc.aio.EOF else self._call.accept(message)  # type: ignore[attr-defined]

    async def write(self, message: Any) -> None:
        await self._context.write(message)
        self._call.figures.sent.inc()


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except DecodeError as error:
        raise InvalidArgumentError("the bytes received are no message of the type that this call takes") from error


async def _accepted(messages: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    following = aiter(messages)
    while True:
        with _parsing():
            message = await anext(following, None)
        if message is None:
            return
        yield call.accept(message)


async def _only(messages: AsyncIterator[Any], call: Call) -> Any:
    with _parsing():
        message = await anext(aiter(messages), None)
    if message is None:
        raise InvalidArgumentError("the call carries no request")
    return call.accept(message)


def _unless_bytes(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Let a handler that passes messages of another process on yield them as they came, serialized."""
    return lambda message: message if isinstance(message, bytes) else serialize(message)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of all methods.

    Args:
        pool: Runs handlers that are plain functions.
        gate: Lets calls in.
    """

    def __init__(self, pool: ThreadPoolExecutor, gate: Gate) -> None:
        self._pool = pool
        self._gate = gate
        self._figures: dict[str, MethodMetrics] = {}

    def expect(self, method: str, handler: Any) -> MethodMetrics:
        """Return the metrics of a method, which are shown from now on."""
        if (figures := self._figures.get(method)) is None:
            figures = MethodMetrics(method, handler.request_streaming, handler.response_streaming)
            self._figures[method] = figures
        return figures

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the wrapped handler of a method, or None where there is none."""
        handler = await continuation(handler_call_details)
        if handler is None:
            count_unknown_method()
            return None
        figures = self.expect(handler_call_details.method, handler)
        behavior: Any = (
            (handler.stream_stream if handler.response_streaming else handler.stream_unary)
            if handler.request_streaming
            else (handler.unary_stream if handler.response_streaming else handler.unary_unary)
        )
        make, wrap = (
            (grpc.stream_stream_rpc_method_handler, self._streaming)
            if handler.response_streaming
            else (grpc.stream_unary_rpc_method_handler, self._unary)
        )
        return make(
            wrap(figures, behavior, handler.request_streaming),
            handler.request_deserializer,
            _unless_bytes(handler.response_serializer),
        )

    def _unary(self, figures: MethodMetrics, behavior: Callable[..., Any], request_streams: bool) -> Callable[..., Any]:
        plain = is_plain(behavior)

        async def handle(requests: Any, context: Context) -> Any:
            call = Call(figures, context, self._gate.max_stream_messages)
            async with call.observed(), self._gate.passed(call):
                argument, inner = await self._prepare(call, requests, context, request_streams)
                if plain:
                    response = await in_thread(self._pool, behavior, argument, inner, request_streams)
                else:
                    response = await behavior(argument, inner)
                call.answered(response)
            if call.code is grpc.StatusCode.OK:
                figures.sent.inc()
            return response

        return handle

    def _streaming(
        self, figures: MethodMetrics, behavior: Callable[..., Any], request_streams: bool
    ) -> Callable[..., Any]:
        plain = is_plain(behavior)

        async def handle(requests: Any, context: Context) -> AsyncIterator[Any]:
            call = Call(figures, context, self._gate.max_stream_messages)
            async with call.observed(), self._gate.passed(call):
                argument, inner = await self._prepare(call, requests, context, request_streams)
                if plain:
                    generator = await in_thread(self._pool, behavior, argument, inner, request_streams)
                    responses: Any = iterate_in_thread(self._pool, iter(generator))
                else:
                    responses = behavior(argument, inner)
                if hasattr(responses, "__aiter__"):
                    try:
                        async for response in responses:
                            yield response
                            figures.sent.inc()
                    finally:
                        # The handler's own cleanup must not wait for the garbage collector.
                        if hasattr(responses, "aclose"):
                            await responses.aclose()
                else:
                    # A coroutine that writes to its context.
                    await responses

        return handle

    async def _prepare(self, call: Call, requests: Any, context: Context, request_streams: bool) -> tuple[Any, Any]:
        argument = _accepted(requests, call) if request_streams else await _only(requests, call)
        return argument, _WatchedContext(context, call)
