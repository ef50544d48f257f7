"""A process that is attached to: what it prints and what it is to read, over one WebSocket."""

import inspect
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from socket import SHUT_RDWR
from typing import Any, Self

from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from sandyard.client.calls import refusal_of
from sandyard.client.config import ClientConfig
from sandyard.client.errors import ConnectionFailedError, TransferError, error_of
from sandyard.client.models import Exited, Lost, Printed, ProcessEvent

_STREAMS = {1: "stdout", 2: "stderr", 4: "terminal"}
_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_OPEN_S = 10.0
_SILENT_S = 50.0  # a server that lives says so every 15
_LIVED_S = 5.0
_PIECE = 64 * 1024
_AHEAD_MAX = 256 * 1024
# Broken connections are reported here, by an error; the library's log adds nothing.
_NOBODY = logging.getLogger(f"{__name__}.nobody")
_NOBODY.addHandler(logging.NullHandler())
_NOBODY.propagate = False


# Of versions since 13 not all know these: no pings, no proxies, opened and closed by calls.
_NEWER: dict[str, Any] = {
    name: value
    for name, value in (("ping_interval", None), ("proxy", None), ("legacy", True))
    if name in inspect.signature(connect).parameters
}


class Attachment:
    """See the module. Take `events` in one thread; everything else may be done in others.

    With `exact`, input that may have been lost with a connection ends it all: it cannot be told
    whether the process has it. A person who pressed a key presses it again.
    """

    def __init__(self, config: ClientConfig, process_path: str, *, exact: bool) -> None:
        scheme, _, rest = config.url.partition("://")
        self._url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}{process_path}/attach"
        self._headers = {"Authorization": f"Bearer {config.api_key}"}
        self._exact = exact
        self._offset = 0
        self._socket: ClientConnection | None = None
        self._is_there = threading.Event()
        self._is_over = threading.Event()
        self._has_news = threading.Event()
        self._lock = threading.Lock()
        self._sent = self._taken = 0
        self._has_ended = self._has_exited = False

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ApiError: there is no such process, or access is denied.
            ConnectionFailedError: the server cannot be reached.
        """
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        """Detach; the process continues."""
        self._is_over.set()
        self._drop(is_broken=not self._has_exited)

    def events(self) -> Iterator[ProcessEvent]:
        """Yield what the process prints, and at last how it ended. A connection that breaks is
        opened again.

        Raises:
            ApiError: its sandbox was paused or ended, or the key was revoked.
            TransferError: input was lost, and that matters.
            ConnectionFailedError: the server cannot be reached for several seconds.
        """
        breaks = 0
        while True:
            since = time.monotonic()
            try:
                for event in self._heard():
                    breaks = 0
                    yield event
                    if isinstance(event, Exited):
                        return
                trouble: Exception = ConnectionFailedError("the server broke off")
            except ConnectionFailedError as error:
                trouble = error
            if self._is_there.is_set() and time.monotonic() - since > _LIVED_S:
                breaks = 0
            self._is_there.clear()
            if self._exact and self._sent > self._taken:
                raise TransferError(
                    "the connection broke while input was on its way: whether the command has it "
                    "cannot be told, and it was ended"
                )
            if breaks == len(_AGAIN_S):
                raise ConnectionFailedError(str(trouble)) from trouble
            time.sleep(_AGAIN_S[breaks])
            breaks += 1
            with suppress(ConnectionFailedError):
                self._open()

    def write(self, data: bytes) -> None:
        """Write to its input, no further ahead of what is taken than a little."""
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._send(piece, len(piece))

    def end(self) -> None:
        """End its input."""
        self._has_ended = True
        self._send(json.dumps({"type": "end"}))

    def resize(self, columns: int, rows: int) -> None:
        """Tell it that its terminal has another size."""
        self._send(json.dumps({"type": "resize", "cols": columns, "rows": rows}))

    def signal(self, name: str) -> None:
        """Send it a signal."""
        self._send(json.dumps({"type": "signal", "signal": name}))

    def _open(self) -> None:
        self._drop(is_broken=True)
        try:
            # The server tells that it lives; a ping would not be answered while it waits for a
            # process that does not read.
            socket = connect(
                f"{self._url}?offset={self._offset}",
                additional_headers=self._headers,
                compression=None,
                open_timeout=_OPEN_S,
                logger=_NOBODY,
                **_NEWER,
            )
        except InvalidStatus as error:
            response = error.response
            refused = refusal_of(response.status_code, bytes(response.body or b""), json.loads)
            if response.status_code in (429, 502, 503, 504):
                raise ConnectionFailedError(refused.message) from error
            raise refused from error
        except (OSError, WebSocketException, TimeoutError) as error:
            raise ConnectionFailedError(f"cannot reach {self._url}: {error}") from error
        with self._lock:
            self._socket, self._sent, self._taken = socket, 0, 0
            self._is_there.set()
        if self._has_ended:  # the process may not have heard of that
            with suppress(ConnectionClosed):
                socket.send(json.dumps({"type": "end"}))

    def _drop(self, *, is_broken: bool) -> None:
        """Close the connection, even if it is broken and another thread waits to send."""
        with self._lock:
            socket, self._socket = self._socket, None
            self._is_there.clear()
        if socket is not None:
            if is_broken:
                with suppress(OSError):
                    socket.socket.shutdown(SHUT_RDWR)
            socket.close()

    def _heard(self) -> Iterator[ProcessEvent]:
        socket = self._socket
        if socket is None or not self._is_there.is_set():
            return
        try:
            while True:
                message = socket.recv(timeout=_SILENT_S)
                if isinstance(message, bytes):
                    self._offset += len(message) - 1
                    yield Printed(_STREAMS.get(message[0], "stdout"), message[1:])
                elif (event := self._event_of(json.loads(message))) is not None:
                    yield event
        except (ConnectionClosed, TimeoutError):
            return
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConnectionFailedError("what the server sends makes no sense") from error

    def _event_of(self, message: dict[str, Any]) -> ProcessEvent | None:
        match message["type"]:
            case "attached":
                self._offset = message["offset"]
                return Lost(message["lost"]) if message["lost"] else None
            case "taken":
                self._taken = message["bytes"]
                self._has_news.set()
                return None
            case "exit":
                self._has_exited = True
                return Exited(message["exitCode"], message["signal"], message["timedOut"])
            case "error":
                raise error_of(
                    message["message"], status=0, code=message["code"], request_id="",
                    details=message.get("details"),
                )  # fmt: skip
            case _:
                return None

    def _send(self, message: bytes | str, count: int = 0) -> None:
        """Send a message, once there is a connection to send it over and, for so many bytes of
        input, room."""
        while not self._is_over.is_set():
            if not self._is_there.wait(1.0):
                continue
            with self._lock:
                socket = self._socket
                is_full = bool(count) and self._sent - self._taken > _AHEAD_MAX
                if socket is not None and not is_full:
                    self._sent += count
            if is_full:
                self._has_news.wait(1.0)
                self._has_news.clear()
            elif socket is not None:
                try:
                    socket.send(message)
                    return
                except ConnectionClosed:
                    if self._exact:
                        return  # the receiving thread notices, and ends it
                    # Until that was noticed; then it goes over the next connection.
                    time.sleep(_AGAIN_S[0])
