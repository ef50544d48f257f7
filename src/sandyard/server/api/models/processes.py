"""Processes as HTTP carries them."""

import base64
import binascii
from datetime import UTC, datetime
from signal import Signals
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sandyard.server.api.models.base import (
    DEFAULT_CWD,
    DEFAULT_USER,
    NOT_BLANK,
    Body,
    Content,
    Cwd,
    Env,
    MakeCwd,
    Model,
    Time,
    UserName,
    bounds,
    either,
    in_base64,
)
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ops import Ended, Program, Size
from sandyard.server.service.sandboxes.processes import (
    INPUT_MAX,
    SIGNAL_NAMES,
    TIMEOUT_MS,
    NewProcess,
)

_MOMENT_MAX_MS = 253_402_300_799_000  # the last second of the year 9999
Encoding = Literal["utf8", "utf-8", "base64"]


class Pty(Body):
    """A terminal's size, in characters."""

    cols: int = Field(80, json_schema_extra=bounds(1, 65535))
    rows: int = Field(24, json_schema_extra=bounds(1, 65535))

    def size(self) -> Size:
        """Return it as the service takes it."""
        return Size(columns=self.cols, rows=self.rows)


class StartProcess(Body):
    """The body of a start."""

    model_config = ConfigDict(json_schema_extra=either("command", "argv"))

    command: str | None = Field(
        None,
        examples=["python3 -m http.server 8000"],
        json_schema_extra={"pattern": NOT_BLANK},
        description="What the shell runs.",
    )
    argv: list[str] | None = Field(
        None,
        examples=[["python3", "-m", "http.server"]],
        json_schema_extra={"minItems": 1, "maxItems": 1024, "prefixItems": [{"minLength": 1}]},
        description="Instead of a command: a program, looked for in PATH, and its arguments.",
    )
    cwd: Cwd | None = Field(None, description=DEFAULT_CWD)
    make_cwd: MakeCwd = False
    env: Env = {}
    user: UserName | None = Field(None, description=DEFAULT_USER)
    tag: str | None = Field(
        None,
        description="A name to find it by, 1 to 64 characters, not all of them digits.",
        json_schema_extra={"pattern": r"^(?![0-9]+$)[^/\x00]{1,64}$"},
    )
    stdin: bool = Field(False, description="Whether it has an input that can be written to.")
    pty: Pty | None = Field(None, description="A terminal to run on; it has an input then.")
    timeout: int | None = Field(
        None,
        description="Milliseconds until it is ended; without it, it may run for ever.",
        json_schema_extra=bounds(TIMEOUT_MS.start, TIMEOUT_MS.stop - 1),
    )

    def wish(self) -> NewProcess:
        """Return what is to be started."""
        return NewProcess(
            command=self.command,
            argv=self.argv or (),
            cwd=self.cwd,
            env=self.env,
            user=self.user,
            tag=self.tag,
            stdin=self.stdin,
            terminal=self.pty.size() if self.pty else None,
            timeout=self.timeout,
            makes_cwd=self.make_cwd,
        )


class SendSignal(Body):
    """The body of a signal."""

    signal: str | int = Field(
        "SIGTERM",
        description="A name or a number.",
        json_schema_extra={"enum": [*SIGNAL_NAMES, *map(int, Signals)]},
    )
    everything: bool = Field(
        False, description="Send it to everything the process has started as well."
    )


class WriteStdin(Body):
    """Input for a process."""

    model_config = ConfigDict(json_schema_extra=in_base64("encoding", "data"))

    data: Content = Field("", description=f"Up to {INPUT_MAX // 2**20} MiB.")
    encoding: Encoding = Field("utf8", description="How `data` is written.")
    close: bool = Field(False, description="End its input when all is written.")

    def bytes(self) -> bytes:
        """Return the bytes that are meant.

        Raises:
            InvalidArgumentError: `data` is not what it is said to be.
        """
        try:
            if self.encoding == "base64":
                return base64.b64decode(self.data, validate=True)
            return self.data.encode()
        except (UnicodeEncodeError, binascii.Error, ValueError) as error:
            what = "base64, as encoding says" if self.encoding == "base64" else "valid Unicode"
            raise InvalidArgumentError(
                f"cannot use data: it is not {what}", field="data"
            ) from error


class InputMessage(Body):
    """A message of an attached client: text for the process's input."""

    type: Literal["input"]
    data: str = ""
    encoding: Encoding = "utf8"

    def bytes(self) -> bytes:
        """Return the bytes that are meant. See `WriteStdin.bytes`."""
        return WriteStdin(data=self.data, encoding=self.encoding).bytes()


class EndMessage(Body):
    """Close the process's input."""

    type: Literal["end"]


class ResizeMessage(Pty):
    """Change the size of the process's terminal."""

    type: Literal["resize"]


class SignalMessage(SendSignal):
    """Send the process a signal."""

    type: Literal["signal"]


AttachMessage = InputMessage | EndMessage | ResizeMessage | SignalMessage
_MESSAGES: TypeAdapter[AttachMessage] = TypeAdapter(
    Annotated[AttachMessage, Field(discriminator="type")]
)


def attach_message(text: str) -> AttachMessage:
    """Return what a message asks for.

    Raises:
        InvalidArgumentError: it asks for nothing that there is.
    """
    try:
        return _MESSAGES.validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise InvalidArgumentError(
            'cannot understand the message: send bytes for the input, or JSON such as {"type": '
            '"resize", "cols": 80, "rows": 24}',
            field="type",
        ) from error


class StdinOut(Model):
    """How much of it the process had room for; send the rest again, with `close` if that was so."""

    written: int
    closed: bool


class SignalledOut(Model):
    """A signal was sent."""

    pid: int
    signal: str


class ProcessOut(Model):
    """A process that was started by the API."""

    pid: int
    tag: str | None
    command: str
    cwd: str
    user: str
    status: Literal["running", "exited"]
    stdin: bool
    pty: Pty | None
    output_bytes: int
    input_bytes: int
    started_at: Time
    ended_at: Time | None
    exit_code: int | None
    signal: str | None
    timed_out: bool
    duration_ms: int | None


def process_out(program: Program) -> ProcessOut:
    """Return a process as it is shown."""
    end, terminal = program.end, program.terminal
    return ProcessOut(
        pid=program.pid,
        tag=program.tag,
        command=program.command,
        cwd=program.cwd,
        user=program.user,
        status="exited" if end else "running",
        stdin=program.takes_input and end is None,
        pty=Pty(cols=terminal.columns, rows=terminal.rows) if terminal else None,
        output_bytes=max(0, program.printed),
        input_bytes=max(0, program.fed),
        started_at=_moment(program.started_ms),
        ended_at=None if end is None else _moment(program.ended_ms or 0),
        exit_code=end.exit_code if end else None,
        signal=end.signal if end else None,
        timed_out=end.timed_out if end else False,
        duration_ms=end.duration_ms if end else None,
    )


def end_out(end: Ended) -> dict[str, object]:
    """Return how a process ended, for the last event of a stream."""
    return {
        "exitCode": end.exit_code,
        "signal": end.signal,
        "timedOut": end.timed_out,
        "durationMs": end.duration_ms,
    }


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(max(0, min(_MOMENT_MAX_MS, milliseconds)) / 1000, UTC)
