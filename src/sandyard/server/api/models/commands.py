"""Commands as HTTP carries them."""

import base64
import codecs
import json
from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from sandyard.server.api.models.base import (
    DEFAULT_CWD,
    DEFAULT_USER,
    NOT_BLANK,
    Body,
    Content,
    Cwd,
    Env,
    MakeCwd,
    Meta,
    Model,
    UserName,
    in_base64,
)
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.service.sandboxes.execute import (
    COMMAND_MAX,
    STDIN_MAX,
    Command,
    CommandOutcome,
)

_PIECE = 48 * 1024  # whole groups of three bytes, which base64 makes four of


class Exec(Body):
    """The body of an exec."""

    model_config = ConfigDict(json_schema_extra=in_base64("stdinEncoding", "stdin"))

    command: str = Field(
        examples=["uname -a"],
        json_schema_extra={"pattern": NOT_BLANK},
        description=f"What the shell runs, up to {COMMAND_MAX // 2**20} MiB.",
    )
    timeout: int = Field(
        30_000,
        description="Milliseconds from the start of the command, 1 to 3600000.",
        json_schema_extra={"minimum": 1, "maximum": 3_600_000},
    )
    cwd: Cwd | None = Field(None, description=DEFAULT_CWD)
    make_cwd: MakeCwd = False
    env: Env = {}
    stdin: Content | None = Field(
        None, description=f"What it reads on standard input, up to {STDIN_MAX // 2**20} MiB."
    )
    stdin_encoding: Literal["utf8", "utf-8", "base64"] = Field(
        "utf8", description="How `stdin` is written: as text, or bytes in base64."
    )
    user: UserName | None = Field(None, description=DEFAULT_USER)
    encoding: Literal["utf8", "utf-8", "base64"] = Field(
        "utf-8", description="How output is given: as text, or exactly in base64."
    )

    def wish(self) -> Command:
        """Return what is to be run.

        Raises:
            InvalidArgumentError: `stdin` is not what it is said to be.
        """
        return Command(
            self.command,
            self.timeout,
            self.cwd,
            self.env,
            self._stdin_bytes(),
            self.user,
            self.make_cwd,
        )

    def _stdin_bytes(self) -> bytes | None:
        if self.stdin is None:
            return None
        try:
            if self.stdin_encoding == "base64":
                return base64.b64decode(self.stdin, validate=True)
            return self.stdin.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                "cannot use stdin: it is not valid Unicode; send bytes with `stdinEncoding` "
                "`base64`",
                field="stdin",
            ) from error
        except ValueError as error:
            raise InvalidArgumentError(
                "cannot use stdin: it is not base64, as stdinEncoding says", field="stdin"
            ) from error


class ExecOut(Model):
    """How a command ended."""

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    execution_time: int
    timed_out: bool
    truncated: bool
    signal: str | None


def exec_out(outcome: CommandOutcome, encoding: str) -> ExecOut:
    """Return how a command ended as it is shown; for output that is not large."""
    return _out(
        outcome, *("".join(_text(one, encoding)) for one in (outcome.stdout, outcome.stderr))
    )


def pieces_of_answer(outcome: CommandOutcome, encoding: str, meta: Meta) -> Iterator[bytes]:
    """Yield the whole answer in small pieces of JSON, each made when it is asked for.

    Made at once, 16 MiB of NUL are 100 MB.
    """
    yield b'{"data":{"stdout":"'
    yield from _escaped(outcome.stdout, encoding)
    yield b'","stderr":"'
    yield from _escaped(outcome.stderr, encoding)
    shown = _out(outcome, "", "").model_dump_json(by_alias=True, exclude={"stdout", "stderr"})
    yield b'",' + shown[1:].encode() + b',"meta":' + meta.model_dump_json(by_alias=True).encode()
    yield b"}"


def _out(outcome: CommandOutcome, stdout: str, stderr: str) -> ExecOut:
    return ExecOut(
        stdout=stdout,
        stderr=stderr,
        exit_code=outcome.exit_code,
        duration_ms=outcome.duration_ms,
        execution_time=outcome.duration_ms,
        timed_out=outcome.timed_out,
        truncated=outcome.truncated,
        signal=outcome.signal,
    )


def _text(data: bytes, encoding: str) -> Iterator[str]:
    """Yield bytes as text, in base64 or with U+FFFD for what is not UTF-8, piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        if encoding == "base64":
            yield base64.b64encode(piece).decode()
        else:
            yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def _escaped(data: bytes, encoding: str) -> Iterator[bytes]:
    for text in _text(data, encoding):
        yield json.dumps(text, ensure_ascii=False)[1:-1].encode()
