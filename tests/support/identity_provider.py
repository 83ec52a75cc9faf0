"""An identity provider on loopback: publishes its keys, and signs tokens."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

ISSUER, AUDIENCE = "https://login.example", "granq"


class Provider:
    """Keys and their URL.

    Attributes:
        url: Of the public keys.
        fetched: How often they were asked for.
        away: Answers with an error while it is set.
    """

    def __init__(self) -> None:
        self.url = ""
        self.fetched = 0
        self.away = False
        self._keys: dict[str, rsa.RSAPrivateKey] = {}
        self.rotate("first")

    def rotate(self, name: str) -> None:
        """Sign with a new key, and publish no other."""
        self._keys = {name: rsa.generate_private_key(public_exponent=65537, key_size=2048)}

    def keys(self) -> bytes:
        public = []
        for name, key in self._keys.items():
            described = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
            public.append({**described, "kid": name, "use": "sig", "alg": "RS256"})
        return json.dumps({"keys": public}).encode()

    def token(self, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """Return a signed token; claims of the value None are left out."""
        ((name, key),) = self._keys.items()
        whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": "carol", "scope": "openid read", "exp": time.time() + 600}
        whole = {claim: value for claim, value in {**whole, **claims}.items() if value is not None}
        return jwt.encode(whole, key, algorithm="RS256", headers={"kid": name, **(headers or {})})


@contextmanager
def identity_provider() -> Iterator[Provider]:
    """Serve a provider's keys while the block runs."""
    provider = Provider()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            provider.fetched += 1
            content = b"" if provider.away else provider.keys()
            self.send_response(503 if provider.away else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider.url = f"http://127.0.0.1:{server.server_port}/keys"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
