"""The answer to a proxied request, sent by ASGI or on the client's raw connection."""

from http import HTTPStatus

from starlette.types import Scope, Send

from sandyard.server.front.headers import Headers, trailers_of

TUNNEL = "sandyard.tunnel"
"""The type of a scope whose client asks for another protocol; its `stream` is the raw
connection."""
_NO_BODY = frozenset({204, 304})


class ProxyAnswer:
    """One answer, which can be begun once."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.status = 499  # until it has begun: the client left before
        self.has_begun = False
        self._scope = scope
        self._send = send
        self._is_tunnel = scope["type"] == TUNNEL
        self._may_have_trailers = False

    async def begin(
        self,
        status: int,
        headers: list[tuple[bytes, bytes]],
        *,
        may_have_trailers: bool = False,
    ) -> None:
        """Send the head."""
        self.has_begun = True
        self.status = status
        self._may_have_trailers = may_have_trailers
        if status in _NO_BODY:
            headers = [(name, value) for name, value in headers if name != b"content-length"]
        if self._is_tunnel:
            framing = [(b"connection", b"close")]
            if status == HTTPStatus.SWITCHING_PROTOCOLS:
                framing = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
            lines = [b"%s: %s\r\n" % one for one in [*headers, *framing]]
            await self._scope["stream"].write(_status_line(status) + b"".join(lines) + b"\r\n")
        else:
            await self._send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": headers,
                    "trailers": may_have_trailers,
                }
            )

    async def write(self, piece: bytes) -> None:
        """Send a piece of the body."""
        if self._is_tunnel:
            await self._scope["stream"].write(piece)
        else:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, trailers: Headers = ()) -> None:
        """End the body, and send trailers."""
        if self._is_tunnel:
            return
        await self._send({"type": "http.response.body", "body": b""})
        if self._may_have_trailers:
            found = trailers_of([(name.lower(), value) for name, value in trailers])
            await self._send({"type": "http.response.trailers", "headers": found})


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()
