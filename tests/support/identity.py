"""An identity provider for tests: a real HTTP server with real keys, on loopback."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

AUDIENCE = "sandyard"


class IdentityProvider:
    """Serves its keys, counts who asks, and signs tokens."""

    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}"
        self.asked = 0
        self.is_down = False
        self.keys: dict[str, Any] = {}
        self.extra: list[dict[str, Any]] = []
        self.add("one")

    def add(self, name: str, *, kind: str = "RS256") -> None:
        """Make one more key."""
        self.keys[name] = (
            rsa.generate_private_key(65537, 2048)
            if kind == "RS256"
            else ec.generate_private_key(ec.SECP256R1())
        )

    def token(
        self, *, kid: str | None = "one", key: Any = None, alg: str = "RS256", **claims: Any
    ) -> str:
        """Sign a token; a claim that is None is left out."""
        now = int(time.time())
        body = {
            "iss": self.issuer, "aud": AUDIENCE, "sub": "user_1", "iat": now, "exp": now + 300,
            **claims,
        }  # fmt: skip
        body = {name: value for name, value in body.items() if value is not None}
        headers = {} if kid is None else {"kid": kid}
        return jwt.encode(body, key or self.keys[kid or "one"], algorithm=alg, headers=headers)

    def answer(self, path: str) -> dict[str, Any] | None:
        """Return what is served under a path."""
        if path == "/.well-known/openid-configuration":
            return {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"}
        if path != "/keys":
            return None
        self.asked += 1
        shown = []
        for name, key in self.keys.items():
            is_rsa = isinstance(key, rsa.RSAPrivateKey)
            algorithm = jwt.get_algorithm_by_name("RS256" if is_rsa else "ES256")
            public = algorithm.to_jwk(key.public_key(), as_dict=True)
            shown.append(
                {**public, "kid": name, "use": "sig", "alg": "RS256" if is_rsa else "ES256"}
            )
        return {"keys": [*self.extra, *shown]}


@contextmanager
def identity_provider(port: int) -> Iterator[IdentityProvider]:
    """Run a provider until the block is left."""
    provider = IdentityProvider(port)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = None if provider.is_down else provider.answer(self.path)
            self.send_response(503 if provider.is_down else 200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps(found or {}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield provider
        finally:
            server.shutdown()
            thread.join()
