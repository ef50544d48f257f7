"""Builds requests and reads responses; no I/O. The synchronous and the asynchronous client share
it.

A `Call` is a request and the way to read its response. `transport` sends calls and knows nothing
about sandboxes; this module knows nothing about sockets.
"""

import base64
import codecs
import inspect
import json
import math
import random
import secrets
import shlex
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from sandyard.client.errors import ApiError, CommandFailedError, SandyardError, error_of
from sandyard.client.models import (
    Cost,
    ExecResult,
    Exited,
    FileInfo,
    Lost,
    PreviewUrl,
    Printed,
    ProcessEvent,
    ProcessInfo,
    RemotePath,
    SignedUrl,
    Snapshot,
    SshAccess,
    file_of,
    process_of,
    snapshot_of,
)
from sandyard.client.options import (
    ChangeOptions,
    CreateOptions,
    ListOptions,
    ProcessOptions,
    fields_of,
)

T = TypeVar("T")
EXEC_S = 30.0
"""The default time limit of a command; compared by identity."""
MARGIN_S = 90.0
TRANSFER_S = 600.0
WORK_S = 3700.0  # a server gives an hour to what copies, moves or removes
OUTPUT_MAX = 16 * 1024 * 1024
COMMAND_MAX = 1024 * 1024
_ONE_REQUEST_S, _ONE_REQUEST_STDIN = 3600.0, 16 * 1024 * 1024
INPUT_PIECE = 8 * 1024 * 1024
WAIT_MAX_S = 60
SHELL = "if [ -x /bin/bash ]; then exec /bin/bash -l; else exec /bin/sh -l; fi"
"""A login shell that a machine has."""
_AGAIN_S = 0.1
_WAIT_MAX_S = 30.0
_AWAY_S = 120.0
_BUSY = frozenset({502, 503, 504})
Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request; `read` converts the response's JSON into the result.

    A `safe` call may be repeated when its outcome is unknown. `content` is a raw body, `body` one
    in JSON. `limit_s` limits the time between two pieces of the response.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    content: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    limit_s: float | None = MARGIN_S
    safe: bool = False


@dataclass
class Retries:
    """When a call that did not succeed is sent again: at most `most` times, later each time."""

    most: int
    made: int = 0

    def pause_s(
        self, call: Call[Any], *, status: int | None = None, retry_after: str | None = None
    ) -> float | None:
        """Return the seconds until it is to be sent again, None if it is not.

        `status` is None where there was no answer.
        """
        if self.made >= self.most or not isinstance(call.content, bytes | None):
            return None  # what is read once is not there a second time
        is_refused = status == 429  # then nothing was done, whatever it is
        if not is_refused and not (call.safe and (status is None or status in _BUSY)):
            return None
        # Jitter, so that clients that were refused together do not retry together.
        pause: float = _AGAIN_S * 3**self.made * (0.5 + random.random())  # noqa: S311 - no secret
        self.made += 1
        if retry_after is not None and retry_after.isascii() and retry_after.isdigit():
            pause = max(pause, min(float(retry_after), _WAIT_MAX_S))
        return pause


def refusal_of(status: int, body: bytes, parsed: Callable[[bytes], Any]) -> ApiError:
    """Return the error that an answer means."""
    try:
        error = parsed(body)["error"]
        return error_of(
            str(error["message"]),
            status=status,
            code=str(error["code"]),
            request_id=str(error.get("requestId", "")),
            details=error.get("details"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Not ours: a proxy in between, say.
        text = body[:200].decode(errors="replace")
        return error_of(
            f"the server answered {status}: {text}", status=status, code="unknown", request_id=""
        )


def result_of(call: Call[T], status: int, body: bytes, parsed: Callable[[bytes], Any]) -> T:
    """Return what an answer means.

    Raises:
        ApiError: it is none of Sandyard's.
    """
    try:
        return call.read(parsed(body))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise error_of(
            f"the server's answer to {call.method} {call.path} makes no sense: does the URL lead "
            "to Sandyard?",
            status=status,
            code="unknown",
            request_id="",
        ) from error


# --- sandboxes ------------------------------------------------------------------------------------


def sandbox_path(reference: str, *parts: object) -> str:
    """Return the path of a sandbox, by id or name, or of something of it."""
    return "/".join(["/v1/sandboxes", *(_quoted(one) for one in (reference, *parts))])


def part_of(path: str, name: object) -> str:
    """Return the path of one of several things."""
    return f"{path}/{_quoted(name)}"


def milliseconds(seconds: float) -> int:
    """Return a time as the server takes it.

    Raises:
        ValueError: it is none.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"cannot use a time-out of {seconds} seconds: it is over 0, and finite")
    return max(1, round(seconds * 1000))


def create(
    template: str | None, wait_s: float, key: str | None, options: Mapping[str, Any]
) -> Call[Raw]:
    """Return the call that creates a sandbox. It gets an idempotency key if it has none, so that a
    repeated call creates one sandbox."""
    fields = fields_of(options, CreateOptions)
    body = fields if template is None else {"template": template, **fields}
    return Call(
        "POST",
        "/v1/sandboxes",
        _sandbox,
        query={"wait": min(math.ceil(wait_s), WAIT_MAX_S)},
        body=body,
        headers=keyed(key),
        limit_s=WAIT_MAX_S + MARGIN_S,
        safe=True,
    )


def get(reference: str) -> Call[Raw]:
    """Tell of a sandbox."""
    return Call("GET", sandbox_path(reference), _sandbox, safe=True)


def list_query(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the query for a list of sandboxes.

    Raises:
        TypeError: there is no option of that name.
    """
    fields_of(wanted, ListOptions)  # which checks the names
    query = {name: value for name, value in wanted.items() if value is not None}
    if "tags" in query:
        query["tag"] = list(query.pop("tags"))
    if "metadata" in query:
        query["metadata"] = json.dumps(query["metadata"])
    return query


def page(
    path: str, query: Mapping[str, Any], cursor: str | None, read: Callable[[Raw], T]
) -> Call[tuple[list[T], str | None]]:
    """Tell of one page of something, and where the next begins."""
    asked = {**query, **({"cursor": cursor} if cursor else {})}

    def read_page(answer: Any) -> tuple[list[T], str | None]:
        found = [read(one) for one in answer["data"]]
        return found, answer["nextCursor"] if answer["hasMore"] else None

    return Call("GET", path, read_page, query=asked, safe=True)


def delete(reference: str) -> Call[None]:
    """Delete a sandbox."""
    return Call("DELETE", sandbox_path(reference), _nothing)


def act(reference: str, action: str, *, safe: bool = True) -> Call[Any]:
    """Return the call of an idempotent action: pause, resume or touch."""
    return Call("POST", sandbox_path(reference, action), _data, safe=safe)


def change(reference: str, changes: Mapping[str, Any]) -> Call[Raw]:
    """Change fields of a sandbox."""
    body = fields_of(changes, ChangeOptions)
    if "name" in changes and changes["name"] is None:
        body["name"] = None
    return Call("PATCH", sandbox_path(reference), _data, body=body, safe=True)


def line_of(command: str | Sequence[str]) -> str:
    """Return a command as a line for the shell."""
    return command if isinstance(command, str) else shlex.join(command)


def is_too_long(line: str) -> bool:
    """Tell whether a command line must be sent as a file."""
    return len(line) > COMMAND_MAX or len(line.encode(errors="surrogateescape")) > COMMAND_MAX


def new_script() -> str:
    """Return a new path in a sandbox for a command line."""
    return f"/tmp/.sandyard-{secrets.token_hex(16)}"  # noqa: S108 - not guessable


def line_from_file(path: str) -> str:
    """Return the command line that removes a file and does what is written in it."""
    where = shlex.quote(path)
    return (
        f"__line=$(cat {where} && echo .) && rm -f {where} || exit 126; "
        'eval "unset __line; ${__line%.}"'
    )


def is_one_request(timeout_s: float | None, stdin: str | bytes | None) -> bool:
    """Tell whether a command can be run by the request that returns all of its output at once."""
    size = len(stdin.encode() if isinstance(stdin, str) else stdin or b"")
    return timeout_s is not None and timeout_s <= _ONE_REQUEST_S and size <= _ONE_REQUEST_STDIN


def execute(
    reference: str,
    command: str | Sequence[str],
    *,
    timeout_s: float,
    cwd: RemotePath | None,
    make_cwd: bool,
    env: Mapping[str, str] | None,
    stdin: str | bytes | None,
    user: str | int | None,
) -> Call[ExecResult]:
    """Run a command to its end."""
    body = {
        "command": line_of(command),
        "timeout": milliseconds(timeout_s),
        "env": dict(env or {}),
        "encoding": "base64",
        **_whose(cwd, user),
    }
    if make_cwd:
        body["makeCwd"] = True
    if stdin is not None:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        body |= {"stdin": base64.b64encode(given).decode(), "stdinEncoding": "base64"}
    return Call(
        "POST", sandbox_path(reference, "exec"), _exec_result, body=body,
        limit_s=timeout_s + MARGIN_S,
    )  # fmt: skip


def checked(result: ExecResult, command: str | Sequence[str], *, check: bool) -> ExecResult:
    """Return how a command ended.

    Raises:
        CommandFailedError: it was to be checked, and did not end well.
    """
    if check and result.exit_code != 0:
        printed = (result.stderr or result.stdout).strip()[-500:]
        why = "it took too long" if result.timed_out else printed or "it printed nothing"
        shown = command if isinstance(command, str) else shlex.join(command)
        raise CommandFailedError(
            f"{shown[:200]!r} ended with {result.exit_code}: {why}", exit_code=result.exit_code
        )
    return result


class Callbacks:
    """Calls functions, which may be coroutine functions, once an event was read: what they raise
    is not taken for an error of the event."""

    def __init__(self) -> None:
        self._due: deque[Callable[[], object]] = deque()

    def tell(self, function: Callable[[T], object] | None, value: T) -> None:
        """Have a function called, if there is one."""
        if function is not None:
            self._due.append(partial(function, value))

    def waiting(self) -> Iterator[Awaitable[object]]:
        """Call the functions, and yield what coroutine functions return, to be awaited."""
        while self._due:
            result = self._due.popleft()()
            if inspect.isawaitable(result):
                yield result

    def call(self) -> None:
        """Call the functions.

        Raises:
            TypeError: one is a coroutine function.
        """
        for one in self.waiting():
            if inspect.iscoroutine(one):
                one.close()
            raise TypeError("callbacks must be functions here; use AsyncSandbox")


class Heard:
    """Collects the output, passes it to callbacks as it arrives, and holds the result."""

    def __init__(
        self, on_stdout: Callable[[str], object] | None, on_stderr: Callable[[str], object] | None
    ) -> None:
        self.callbacks = Callbacks()
        self._tell = {"stdout": on_stdout, "stderr": on_stderr}
        self._decoders = {
            name: codecs.getincrementaldecoder("utf-8")("replace") for name in self._tell
        }
        self._output: dict[str, bytearray] = {name: bytearray() for name in self._tell}
        self._began = time.monotonic()
        self._end: Exited | None = None
        self._is_cut = False

    def feed(self, event: ProcessEvent) -> None:
        """Take an event of the command."""
        match event:
            case Printed(stream=stream, data=data):
                output = self._output[stream]
                self._is_cut = self._is_cut or len(output) + len(data) > OUTPUT_MAX
                output += data[: OUTPUT_MAX - len(output)]
                self._pass_on(data, stream)
            case Lost():
                self._is_cut = True
            case Exited():
                self._end = event
                for stream in self._tell:
                    self._pass_on(b"", stream, is_last=True)

    def _pass_on(self, data: bytes, stream: str, *, is_last: bool = False) -> None:
        """Pass output to its callback as text; a character that is cut in two follows once it is
        whole."""
        tell = self._tell.get(stream)
        if tell is not None and (text := self._decoders[stream].decode(data, final=is_last)):
            self.callbacks.tell(tell, text)

    def result(self) -> ExecResult:
        """Return how it ended."""
        end = self._end or Exited(1, None, timed_out=False)
        return ExecResult(
            stdout_bytes=bytes(self._output["stdout"]),
            stderr_bytes=bytes(self._output["stderr"]),
            exit_code=end.exit_code,
            duration_ms=round((time.monotonic() - self._began) * 1000),
            timed_out=end.timed_out,
            truncated=self._is_cut,
        )


def _whose(cwd: RemotePath | None, user: str | int | None) -> dict[str, Any]:
    """Return the directory and the user of a program; without them it has the template's."""
    given = {"cwd": None if cwd is None else str(cwd), "user": user}
    return {name: value for name, value in given.items() if value is not None}


def run_options(
    timeout_s: float | None,
    cwd: RemotePath | None,
    env: Mapping[str, str] | None,
    user: str | int | None,
    *,
    make_cwd: bool = False,
    has_stdin: bool,
) -> dict[str, Any]:
    """Return what a command that is run is started with."""
    options: dict[str, Any] = {"env": dict(env or {}), **_whose(cwd, user)}
    if timeout_s is not None:
        options["timeout"] = milliseconds(timeout_s)
    if make_cwd:
        options["make_cwd"] = True
    return {**options, "stdin": has_stdin}


def logs(reference: str) -> Call[str]:
    """Tell the last of what a machine printed on its console."""
    return Call(
        "GET", sandbox_path(reference, "logs"), lambda a: str(a["data"]["console"]), safe=True
    )


def url(reference: str, port: int, *, cookie: bool, ttl: int | None) -> Call[PreviewUrl]:
    """Make a URL of what listens on a port."""
    query: dict[str, object] = {"port": port, "access": "cookie" if cookie else "host"}
    if ttl is not None:
        query["ttl"] = ttl
    return Call("GET", sandbox_path(reference, "url"), _preview, query=query, safe=True)


def cost(reference: str) -> Call[Cost]:
    """Tell what a sandbox costs."""
    return Call("GET", sandbox_path(reference, "cost"), _cost, safe=True)


def ssh(reference: str) -> Call[SshAccess]:
    """Tell how to log in by SSH."""
    return Call("GET", sandbox_path(reference, "ssh"), _ssh, safe=True)


def network(reference: str) -> Call[Raw]:
    """Tell what a sandbox may reach."""
    return Call("GET", sandbox_path(reference, "network"), lambda a: dict(a["data"]), safe=True)


def set_network(reference: str, rules: Mapping[str, object]) -> Call[Raw]:
    """Replace what a sandbox may reach."""
    path = sandbox_path(reference, "network")
    return Call("PUT", path, lambda a: dict(a["data"]), body=dict(rules), safe=True)


def connections(reference: str, since: float | None) -> Call[list[Raw]]:
    """Tell what a sandbox with network rules reached or was refused."""
    query = {} if since is None else {"since": since}
    path = sandbox_path(reference, "egress")
    return Call("GET", path, lambda a: list(a["data"]), query=query, safe=True)


def stats(reference: str) -> Call[Mapping[str, float]]:
    """Tell what a sandbox takes now."""
    return Call(
        "GET", sandbox_path(reference, "stats"), lambda a: dict(a["data"]["stats"]), safe=True
    )


def fork(reference: str, count: int, name: str | None) -> Call[list[Raw]]:
    """Make sandboxes that begin as one is now."""
    body = {"count": count, **({"name": name} if name else {})}
    return Call(
        "POST", sandbox_path(reference, "fork"), lambda a: list(a["data"]), body=body,
        headers=keyed(None), safe=True,
    )  # fmt: skip


def snapshot(reference: str, name: str | None) -> Call[Snapshot]:
    """Save a sandbox as it is now."""
    return Call(
        "POST", sandbox_path(reference, "snapshots"), lambda a: snapshot_of(a["data"]),
        body={} if name is None else {"name": name}, headers=keyed(None), safe=True,
    )  # fmt: skip


def roll_back(reference: str, snapshot_reference: str) -> Call[Raw]:
    """Put a sandbox back to a snapshot."""
    body = {"snapshotId": snapshot_reference}
    return Call("POST", sandbox_path(reference, "rollback"), _data, body=body)


def delete_snapshot(reference: str) -> Call[None]:
    """Remove a snapshot."""
    return Call("DELETE", part_of("/v1/snapshots", reference), _nothing)


def credits_left() -> Call[Raw]:
    """Tell what credits there are."""
    return Call("GET", "/v1/billing/credits", _data, safe=True)


def usage(period: str) -> Call[Raw]:
    """Tell what was used in a period."""
    return Call("GET", "/v1/billing/my-usage", _data, query={"period": period}, safe=True)


def plain(method: str, path: str, *, query: Any = None, body: Any = None) -> Call[Any]:
    """Return a call of any endpoint of the HTTP API, whose result is the decoded JSON."""
    safe = method in ("GET", "HEAD")
    return Call(method, path, lambda a: a, query=query or {}, body=body, safe=safe)


# --- processes ------------------------------------------------------------------------------------


def start(
    path: str, command: str | Sequence[str], key: str | None, options: Mapping[str, Any]
) -> Call[int]:
    """Start a process and return its pid."""
    what: dict[str, Any] = (
        {"command": command} if isinstance(command, str) else {"argv": list(command)}
    )
    body = {**what, **fields_of(options, ProcessOptions)}
    return Call(
        "POST", path, lambda a: int(a["data"]["pid"]), body=body, headers=keyed(key), safe=True
    )


def processes(path: str) -> Call[list[ProcessInfo]]:
    """Tell of all processes."""
    return Call("GET", path, lambda a: [process_of(one) for one in a["data"]], safe=True)


def process(path: str) -> Call[ProcessInfo]:
    """Tell of one process."""
    return Call("GET", path, lambda a: process_of(a["data"]), safe=True)


def feed(
    path: str, data: memoryview, *, offset: int | None = None, closes: bool = False
) -> Call[int]:
    """Write to a process's input, and return how many bytes it took. With the `offset` in its input
    the call can be repeated."""
    query = {"offset": offset, "close": "true" if closes and len(data) <= INPUT_PIECE else None}
    return Call(
        "PUT", f"{path}/stdin", lambda a: int(a["data"]["written"]),
        query={name: value for name, value in query.items() if value is not None},
        content=bytes(data[:INPUT_PIECE]), limit_s=TRANSFER_S, safe=offset is not None,
    )  # fmt: skip


class Pouring:
    """Writes data to the input of a new process, and closes it, over connections that may break."""

    def __init__(self, path: str, data: str | bytes) -> None:
        self._path = path
        self._data = memoryview(data.encode() if isinstance(data, str) else data)
        self._offset = 0
        self._heard_at = time.monotonic()
        self.is_done = False

    def call(self) -> Call[int]:
        """Return the next call."""
        left = self._data[self._offset :]
        return feed(self._path, left, offset=self._offset, closes=True)

    def took(self, count: int) -> None:
        """Note the result of a call."""
        is_last = len(self._data) - self._offset <= INPUT_PIECE
        self._offset += count
        self._heard_at = time.monotonic()
        self.is_done = is_last and self._offset >= len(self._data)

    def pause_s(self, error: SandyardError) -> float:
        """Return after how long to try again.

        Raises:
            SandyardError: that would not help.
        """
        is_passing = not isinstance(error, ApiError) or error.status in _BUSY
        if not is_passing or time.monotonic() - self._heard_at > _AWAY_S:
            raise error
        return 1.0


def close_stdin(path: str) -> Call[None]:
    """End a process's input."""
    return Call("POST", f"{path}/stdin", _nothing, body={"close": True}, safe=True)


def signal(path: str, name: str | int, *, everything: bool) -> Call[None]:
    """Signal a process."""
    body = {"signal": name, "everything": everything}
    is_final = str(name).upper().removeprefix("SIG") in ("KILL", "9")
    return Call("POST", f"{path}/signal", _nothing, body=body, safe=is_final)


def resize(path: str, columns: int, rows: int) -> Call[None]:
    """Give a terminal another size."""
    return Call("POST", f"{path}/resize", _nothing, body={"cols": columns, "rows": rows}, safe=True)


# --- files ----------------------------------------------------------------------------------------


def read_file(
    path: str, where: RemotePath, user: str, offset: int = 0, length: int | None = None
) -> Call[None]:
    """Read a file, or a part of it, as a stream."""
    headers = {}
    if offset or length is not None:
        end = "" if length is None else str(offset + max(1, length) - 1)
        headers = {"Range": f"bytes={offset}-{end}"}
    query = {**_where(where), "user": user}
    return Call("GET", path, _nothing, query=query, headers=headers, safe=True)


class Part:
    """Extracts the requested range; of a file of unknown size the server sends everything."""

    def __init__(self, status: int, offset: int, length: int | None) -> None:
        self._skip = 0 if status == 206 else offset
        self._left = length

    def cut(self, piece: bytes) -> bytes:
        """Return the bytes of a piece that are in the range."""
        skipped = min(self._skip, len(piece))
        self._skip -= skipped
        piece = piece[skipped:] if self._left is None else piece[skipped : skipped + self._left]
        if self._left is not None:
            self._left -= len(piece)
        return piece

    @property
    def is_whole(self) -> bool:
        """Whether the range is complete."""
        return self._left == 0


def write_file(
    path: str,
    where: RemotePath,
    user: str,
    content: Any,
    mode: str | None,
    owner: str | None,
    if_match: str | None = None,
) -> Call[int]:
    """Write a file, and return how many bytes it has."""
    if content is None or isinstance(content, int | Mapping):
        kind = type(content).__name__
        raise TypeError(f"cannot write {kind}: the content must be bytes, str or pieces of bytes")
    given = {**_where(where), "user": user, "mode": mode, "owner": owner}
    query = {name: value for name, value in given.items() if value is not None}
    return Call(
        "PUT", path, lambda a: int(a["data"]["size"]), query=query, content=content,
        headers={} if if_match is None else {"If-Match": if_match},
        # Repeated, it would meet its own file.
        limit_s=TRANSFER_S, safe=isinstance(content, bytes) and if_match is None,
    )  # fmt: skip


def read_changed(path: str, where: RemotePath, user: str, etag: str) -> Call[None]:
    """Read a file if it has another entity tag than this one."""
    query = {**_where(where), "user": user}
    headers = {"If-None-Match": etag}
    return Call("GET", path, _nothing, query=query, headers=headers, limit_s=TRANSFER_S, safe=True)


def list_folder(path: str, where: RemotePath, user: str, depth: int) -> Call[list[FileInfo]]:
    """Tell what is in a folder."""
    query = {**_where(where or "/workspace"), "depth": depth, "user": user}
    return Call(
        "GET", f"{path}/list", lambda a: [file_of(one) for one in a["data"]["entries"]],
        query=query, safe=True,
    )  # fmt: skip


def file_info(path: str, where: RemotePath, user: str) -> Call[FileInfo]:
    """Tell what a path leads to."""
    query = {**_where(where), "user": user}
    return Call("GET", f"{path}/stat", _file, query=query, safe=True)


def make_folder(path: str, where: RemotePath, user: str) -> Call[FileInfo]:
    """Make a folder."""
    body = {**_where(where), "user": user}
    return Call("POST", f"{path}/mkdir", _file, body=body, safe=True)


def transfer(
    path: str, action: str, source: RemotePath, target: RemotePath, user: str, *, overwrite: bool
) -> Call[FileInfo]:
    """Move or copy a file or folder."""
    ends = {**_where(source, "from"), **_where(target, "to")}
    body = {**ends, "overwrite": overwrite, "user": user}
    return Call("POST", f"{path}/{action}", _file, body=body, limit_s=WORK_S)


def remove(path: str, where: RemotePath, user: str, *, recursive: bool) -> Call[None]:
    """Remove a file or folder."""
    query = {**_where(where), "user": user, "recursive": recursive}
    return Call("DELETE", path, _nothing, query=query, limit_s=WORK_S)


def unpack(path: str, where: RemotePath, user: str, content: Any) -> Call[None]:
    """Unpack an archive into a folder."""
    query = {**_where(where), "user": user}
    return Call(
        "PUT", f"{path}/archive", _nothing, query=query, content=content, limit_s=TRANSFER_S
    )


def sign(path: str, where: RemotePath, user: str, method: str, expires_s: int) -> Call[SignedUrl]:
    """Make a URL that reads or writes one file without a key."""
    body = {**_where(where), "user": user, "method": method, "expiresIn": expires_s}
    return Call("POST", f"{path}/sign", _signed, body=body, safe=True)


# --- how answers are read -------------------------------------------------------------------------


def keyed(key: str | None) -> dict[str, str]:
    """Return the header with which a repeated call is carried out once."""
    return {"Idempotency-Key": key or str(uuid.uuid4())}


def _data(answer: Any) -> Any:
    data = answer["data"]
    if not isinstance(data, dict):
        raise TypeError("no object")
    return data


def sandbox_of(raw: Raw) -> Raw:
    """Return a sandbox out of an answer, with all that the SDK looks at in it."""
    for name in ("id", "name", "status", "template", "createdAt"):
        raw[name]
    return raw


def _sandbox(answer: Any) -> Raw:
    return sandbox_of(_data(answer))


def _quoted(name: object) -> str:
    # A name out of an argument of a command may be of any bytes.
    return quote(str(name).encode(errors="surrogateescape"), safe="")


def _where(path: RemotePath, name: str = "path") -> dict[str, str]:
    """Return the parameter for a path: in base64 if it is not valid UTF-8."""
    path = str(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        exact = base64.b64encode(path.encode(errors="surrogateescape")).decode()
        return {f"{name}Base64": exact}
    return {name: path}


def _nothing(answer: Any) -> None:
    del answer


def _file(answer: Any) -> FileInfo:
    return file_of(answer["data"])


def _signed(answer: Any) -> SignedUrl:
    data = answer["data"]
    return SignedUrl(data["url"], data["method"], data["expiresAt"])


def _preview(answer: Any) -> PreviewUrl:
    data = answer["data"]
    return PreviewUrl(data["url"], data["port"], data["expiresAt"])


def _cost(answer: Any) -> Cost:
    data = answer["data"]
    return Cost(data["totalMicros"] / 1e6, data["hourlyMicros"] / 1e6, data["isFree"])


def _ssh(answer: Any) -> SshAccess:
    data = answer["data"]
    return SshAccess(
        host=data["host"],
        port=data["port"],
        user=data["user"],
        command=data["command"],
        host_key=data["hostKey"],
        known_hosts=data["knownHosts"],
    )


def _exec_result(answer: Any) -> ExecResult:
    data = answer["data"]
    return ExecResult(
        stdout_bytes=base64.b64decode(data["stdout"]),
        stderr_bytes=base64.b64decode(data["stderr"]),
        exit_code=data["exitCode"],
        duration_ms=data["durationMs"],
        timed_out=data["timedOut"],
        truncated=data["truncated"],
    )
