"""A TCP proxy that drops, delays, refuses or silences connections when it is told to."""

import asyncio
import contextlib
import threading
from collections.abc import Callable

Target = Callable[[], tuple[str, int]]


class Proxies:
    """Proxies on loopback, run by one thread. A context manager; at its end no port is held."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._made: list[Proxy] = []

    def __enter__(self) -> "Proxies":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self._made:
            asyncio.run_coroutine_threadsafe(proxy.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def add(self, name: str, target: Target) -> "Proxy":
        """Return a proxy to where `target` says at each connection."""
        proxy = Proxy(name, target, self._loop)
        asyncio.run_coroutine_threadsafe(proxy.open(), self._loop).result(10)
        self._made.append(proxy)
        return proxy


class Proxy:
    """One listening port. What breaks it may be called from any thread."""

    def __init__(self, name: str, target: Target, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.port = 0
        self._target = target
        self._loop = loop
        self._delay = 0.0
        self._refusing = False
        self._whole = asyncio.Event()
        self._whole.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and break all connections."""
        if self._server is not None:
            self._server.close()
        self._abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drop(self) -> None:
        """Break all connections, in both directions, without a word."""
        self._loop.call_soon_threadsafe(self._abort)

    def delay(self, seconds: float) -> None:
        """Hold all that is sent from now on back for as long; 0 ends it."""
        self._delay = seconds

    def refuse(self, refusing: bool) -> None:
        """Break all connections, and new ones as they come, until told otherwise."""
        self._refusing = refusing
        if refusing:
            self.drop()

    def cut(self) -> None:
        """Hold back all that is sent, the end of a connection too; both sides notice nothing but silence."""
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        """Pass on again, also what was held back."""
        self._loop.call_soon_threadsafe(self._whole.set)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        far: asyncio.StreamWriter | None = None
        self._writers.add(writer)
        try:
            if self._refusing:
                return
            host, port = self._target()
            far_reader, far = await asyncio.open_connection(host, port)
            self._writers.add(far)
            pumps = [asyncio.create_task(self._pump(*pair)) for pair in ((reader, far), (far_reader, writer))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            return  # nobody listens there now, as the other side is about to see
        finally:
            for end in filter(None, (writer, far)):
                self._writers.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        await self._whole.wait()
