"""An S3-compatible object store over a real socket, which checks signatures, and a line to it that can break."""

import logging
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "granq"
_ALL = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:*"],"Resource":"*"}]}'


@dataclass(frozen=True)
class ObjectStore:
    """A running server with one bucket.

    Attributes:
        port: Where it listens on loopback.
        key: Access key that it takes.
        secret: What the key signs with.
    """

    port: int
    key: str
    secret: str

    def environment(self, port: int | None = None) -> dict[str, str]:
        """Return the variables by which drivers find it, directly or through another port."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }


def _moto(url: str, action: str, body: bytes = b"") -> None:
    asked = urllib.request.Request(f"{url}/moto-api/{action}", body, {"Content-Type": "text/plain"})
    urllib.request.urlopen(asked).close()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server for the block; it demands signed requests of its only user.

    What such a server keeps is the whole process's, so one runs at a time, and each begins with nothing.
    """
    for name in ("moto", "werkzeug"):  # They log requests whole, in this very process.
        logging.getLogger(name).setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        url = f"http://127.0.0.1:{port}"
        _moto(url, "reset")
        _moto(url, "reset-auth", b"inf")
        session = boto3.Session("setup", "setup", region_name="us-east-1")
        session.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        users = session.client("iam", endpoint_url=url)
        users.create_user(UserName="granq")
        users.put_user_policy(UserName="granq", PolicyName="all", PolicyDocument=_ALL)
        made = users.create_access_key(UserName="granq")["AccessKey"]
        # From the next request on, none passes without a signature that fits.
        _moto(url, "reset-auth", b"0")
        yield ObjectStore(port, made["AccessKeyId"], made["SecretAccessKey"])
    finally:
        server.stop()


class _Full(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # whose clients may ask before they send a body

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = b"<Error><Code>XMinioStorageFull</Code><Message>no room</Message></Error>"
        self.send_response(507)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def full_object_store() -> Iterator[int]:
    """Run a server that has room for nothing, and give its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Full) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Line:
    """A TCP line to a port of loopback that goes dead for good after some bytes, in both directions together.

    Args:
        target: The port.
        bytes_left: How much it still carries.
    """

    def __init__(self, target: int, bytes_left: int) -> None:
        self._target = target
        self._left = bytes_left
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def is_dead(self) -> bool:
        """Whether it broke."""
        return self._left <= 0

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._sockets += [here, there]
                for source, sink in ((here, there), (there, here)):
                    thread = threading.Thread(target=self._carry, args=(source, sink), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(16384):
                with self._lock:
                    passed, self._left = data[: max(0, self._left)], self._left - len(data)
                sink.sendall(passed)
                if self.is_dead:
                    self.close()
                    return
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Cut it now."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in (self._listener, *sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
