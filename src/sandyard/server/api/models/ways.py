"""Models of previews, SSH and terminals."""

import json
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from sandyard.server.api.models.base import Body, Model, Time
from sandyard.server.core.ops import Size

Side = Annotated[int, Field(ge=1, le=65535)]


class UrlOut(Model):
    """The URL of a port, and its expiry."""

    url: str
    port: int
    expires_at: Time


class SshOut(Model):
    """How to log in to a sandbox; `command` can be pasted into a terminal."""

    host: str
    port: int
    user: str
    command: str
    key_id: str | None
    host_key: str
    known_hosts: str


class NewTerminal(Body):
    """A new terminal, or with `terminalId` an existing one."""

    sandbox_id: str
    terminal_id: str | None = Field(
        None, json_schema_extra={"pattern": "^terminal-", "maxLength": 64}
    )


class TerminalOut(Model):
    """A ticket that opens a terminal once; connect a WebSocket to `wsPath`."""

    session_id: str
    sandbox_id: str
    ws_path: str
    expires_at: Time
    terminal_id: str


class TypedMessage(Body):
    """Keys that were pressed."""

    type: Literal["input"]
    data: str


class SizeMessage(Body):
    """The terminal has another size."""

    type: Literal["resize"]
    cols: Side
    rows: Side

    def size(self) -> Size:
        """Return the size."""
        return Size(self.cols, self.rows)


_MESSAGE: TypeAdapter[TypedMessage | SizeMessage] = TypeAdapter(
    Annotated[TypedMessage | SizeMessage, Field(discriminator="type")]
)


def typed(text: str) -> bytes | SizeMessage:
    """Return what a text message means: `input` or `resize` in JSON; any other text is
    keystrokes."""
    if text.startswith("{"):
        try:
            message = _MESSAGE.validate_python(json.loads(text))
        except (ValidationError, ValueError, RecursionError):
            return text.encode("utf-8", "replace")
        return (
            message if isinstance(message, SizeMessage) else message.data.encode("utf-8", "replace")
        )
    return text.encode("utf-8", "replace")
