"""Server-sent events over connections that may break; no I/O.

The transport feeds lines and takes events. After a disconnect, `query` returns the parameters that
resume the stream, and `pause_s` the delay before that.
"""

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from sandyard.client.errors import ApiError, ConnectionFailedError, error_of
from sandyard.client.models import Exited, FileChange, Lost, Printed, ProcessEvent

EventT = TypeVar("EventT")
_PASSING = frozenset({429, 502, 503, 504})
_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_LIVED_S = 5.0
EVENTS_S = 60.0
"""Of a stream of events that lives, something is heard every 15 seconds."""
_PATIENCE_S = 120.0
"""How long a server may be away in the middle of a stream, as when its host restarts."""


class Followed(Generic[EventT]):
    """A stream of events that can be resumed. `is_over` is true after its last event."""

    def __init__(self, path: str, query: Mapping[str, Any]) -> None:
        self.path = path
        self._query = dict(query)
        self.is_over = False
        self._breaks = 0
        self._since: float | None = None
        self._heard_at: float | None = None
        self._fields: dict[str, str] = {}

    @property
    def query(self) -> dict[str, Any]:
        """Return the query parameters that resume the stream."""
        return dict(self._query)

    def began(self) -> list[EventT]:
        """Return the events to emit when a connection has been made."""
        self._since = time.monotonic()
        self._heard_at = self._heard_at or self._since
        return []

    def feed(self, line: str) -> EventT | None:
        """Take a line, without its end, and return the event that it completes, if it does.

        Raises:
            ApiError: the server told that it is over, and why.
        """
        self._breaks, self._heard_at = 0, time.monotonic()
        if line.startswith(":"):
            return None
        if line:
            name, _, value = line.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        try:
            name, data = fields.get("event", ""), json.loads(fields["data"])
            if self._is_refusal(name, data):
                self.is_over = True
                raise error_of(
                    str(data["message"]),
                    status=0,
                    code=str(data["code"]),
                    request_id="",
                    details=data.get("details"),
                )
            return self._event(name, data, fields.get("id"))
        except (ValueError, KeyError, TypeError) as error:
            raise ConnectionFailedError("the server's events make no sense") from error

    def broke(self, error: Exception) -> float:
        """Return after how long to try again.

        Raises:
            ConnectionFailedError: the server has been away for too long: for two minutes in the
                middle of a stream, or for several seconds before it began.
        """
        self._fields = {}
        if self._since is not None and time.monotonic() - self._since > _LIVED_S:
            # It worked for a while, whether any event arrived or not.
            self._breaks, self._heard_at = 0, time.monotonic()
        self._since = None
        heard_at, number = self._heard_at, min(self._breaks, len(_AGAIN_S) - 1)
        is_over = (
            self._breaks >= len(_AGAIN_S)
            if heard_at is None
            else time.monotonic() - heard_at > _PATIENCE_S
        )
        if is_over:
            raise ConnectionFailedError(str(error)) from error
        self._breaks += 1
        return _AGAIN_S[number]

    def refused(self, error: ApiError) -> float:
        """Return after how long to try again, if time may mend it.

        Raises:
            ApiError: it will not.
        """
        if self.is_over or error.status not in _PASSING:
            raise error
        return self.broke(error)

    def ended(self) -> float:
        """Return after how long to try again: the server has ended the stream in the middle."""
        return self.broke(
            ConnectionFailedError("the server broke off in the middle of what it told")
        )

    def _is_refusal(self, name: str, data: Any) -> bool:
        """Tell whether an event is an error of the server's, the last one."""
        return name == "error"

    def _event(self, name: str, data: Any, number: str | None) -> EventT | None:
        raise NotImplementedError


class Following(Followed[ProcessEvent]):
    """The output of a process from an offset, each byte once, and its end."""

    def __init__(self, process_path: str, offset: int) -> None:
        super().__init__(f"{process_path}/output", {"encoding": "base64"})
        self.offset = offset

    @property
    def query(self) -> dict[str, Any]:
        """See `Followed.query`."""
        return {**self._query, "offset": self.offset}

    def _event(self, name: str, data: Any, number: str | None) -> ProcessEvent | None:
        self.offset = self.offset if number is None else int(number)
        match name:
            case "output":
                return Printed(data["stream"], base64.b64decode(data["data"], validate=True))
            case "lost":
                return Lost(int(data["bytes"]))
            case "exit":
                self.is_over = True
                return Exited(data["exitCode"], data["signal"], data["timedOut"])
            case _:
                return None  # of a later version


class Watching(Followed[FileChange]):
    """Changes in a directory; a reconnect is reported as `overflow`, because changes may be
    missed."""

    def __init__(self, files_path: str, folder: str, user: str, *, recursive: bool) -> None:
        query = {"path": folder, "user": user, "recursive": recursive}
        super().__init__(f"{files_path}/watch", query)
        self.on_begin: Callable[[], object] = bool
        self._folder = folder
        self._has_begun = False

    def began(self) -> list[FileChange]:
        """See `Followed.began`."""
        super().began()
        self.on_begin()
        is_again, self._has_begun = self._has_begun, True
        return [FileChange("overflow", self._folder, is_folder=True)] if is_again else []

    def _event(self, name: str, data: Any, number: str | None) -> FileChange | None:
        if name == "overflow":
            return FileChange("overflow", data["path"], is_folder=True)
        if name != "change":
            return None
        return FileChange(data["type"], data["path"], data["folder"], data.get("from"))


class Statuses(Followed[Mapping[str, Any]]):
    """A sandbox now, and after each change of its status, until it is deleted."""

    def __init__(self, sandbox_path: str) -> None:
        super().__init__(f"{sandbox_path}/events", {})

    def _event(self, name: str, data: Any, number: str | None) -> Mapping[str, Any] | None:
        if name != "status":
            return None
        self.is_over = data["status"] == "destroyed"
        values: Mapping[str, Any] = data
        return values
