"""The interceptor of all servers: validates what comes in, and turns what is raised into statuses, metrics and logs.

It wraps the handler's iteration, not only its call, so that errors in the midst of a stream are told as well.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from services.common.metrics import MethodMetrics, count_unknown_method
from services.common.rpc.blocking import in_thread, is_plain, iterate_in_thread
from services.common.rpc.call import Call, Context


class _WatchedContext:
    """A context that counts, and whose `read` gives valid messages only, for handlers that do not use iterators."""

    def __init__(self, context: Context, call: Call) -> None:
        self._context = context
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        message = await self._context.read()
        return message if message is grpc.aio.EOF else self._call.accept(message)  # type: ignore[attr-defined]

    async def write(self, message: Any) -> None:
        await self._context.write(message)
        self._call.figures.sent.inc()


async def _accepted(messages: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    async for message in messages:
        yield call.accept(message)


def _unless_bytes(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Let a handler that passes messages of another process on yield them as they came, serialized."""
    return lambda message: message if isinstance(message, bytes) else serialize(message)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of all methods.

    Args:
        pool: Runs handlers that are plain functions.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
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
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        wrap = self._streaming if handler.response_streaming else self._unary
        return make(
            wrap(figures, behavior, handler.request_streaming),
            handler.request_deserializer,
            _unless_bytes(handler.response_serializer),
        )

    def _unary(self, figures: MethodMetrics, behavior: Callable[..., Any], request_streams: bool) -> Callable[..., Any]:
        plain = is_plain(behavior)

        async def handle(request: Any, context: Context) -> Any:
            call = Call(figures, context)
            async with call.observed():
                argument, inner = self._prepare(call, request, context, request_streams)
                if plain:
                    response = await in_thread(self._pool, behavior, argument, inner, request_streams)
                else:
                    response = await behavior(argument, inner)
            if call.code is grpc.StatusCode.OK:
                figures.sent.inc()
            return response

        return handle

    def _streaming(
        self, figures: MethodMetrics, behavior: Callable[..., Any], request_streams: bool
    ) -> Callable[..., Any]:
        plain = is_plain(behavior)

        async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
            call = Call(figures, context)
            async with call.observed():
                argument, inner = self._prepare(call, request, context, request_streams)
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

    def _prepare(self, call: Call, request: Any, context: Context, request_streams: bool) -> tuple[Any, Any]:
        argument = _accepted(request, call) if request_streams else call.accept(request)
        return argument, _WatchedContext(context, call)
