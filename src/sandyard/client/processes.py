"""Processes of a sandbox that live on: `Sandyard(…).processes("name")`."""

import base64
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from sandyard.client.errors import ApiError, ConnectionFailedError
from sandyard.client.files import Channel

_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 4.0)
_INPUT = 512 * 1024


@dataclass(frozen=True)
class Printed:
    """A piece of what a process printed, on `stdout`, `stderr` or its `terminal`."""

    stream: str
    data: bytes


@dataclass(frozen=True)
class Lost:
    """So many bytes are kept no more."""

    count: int


@dataclass(frozen=True)
class Exited:
    """How a process ended."""

    exit_code: int
    signal: str | None
    timed_out: bool


@dataclass(frozen=True)
class ProcessInfo:
    """A process as the server tells of it; `raw` has every field."""

    pid: int
    tag: str | None
    command: str
    status: str
    exit_code: int | None
    raw: Mapping[str, Any] = field(repr=False)


class Process:
    """One process of a sandbox, by its pid or tag."""

    def __init__(self, channel: Channel, path: str) -> None:
        self._channel = channel
        self._path = path

    def info(self) -> ProcessInfo:
        """Return what is told of it."""
        return _info(self._channel.ask("GET", self._path)["data"])

    def events(self, offset: int = 0) -> Iterator[Printed | Lost | Exited]:
        """Yield what it prints from a byte on, and at last how it ended.

        A connection that breaks is opened again, and nothing is told twice.

        Raises:
            ApiError: there is no such process, or its sandbox was paused or ended.
            ConnectionFailedError: the server cannot be reached for several seconds.
        """
        tries = iter(_AGAIN_S)
        while True:
            try:
                for event, number, data in self._events(offset):
                    tries = iter(_AGAIN_S)
                    offset = offset if number is None else number
                    match event:
                        case "output":
                            yield Printed(data["stream"], base64.b64decode(data["data"]))
                        case "lost":
                            yield Lost(data["bytes"])
                        case "exit":
                            yield Exited(data["exitCode"], data["signal"], data["timedOut"])
                            return
                        case "error":
                            raise ApiError(
                                data["message"], status=0, code=data["code"], request_id="",
                                details=data.get("details"),
                            )  # fmt: skip
                        case _:
                            pass  # of a later version
                raise ConnectionFailedError("the server broke off in the middle of the output")
            except (ConnectionFailedError, httpx.HTTPError) as error:
                pause_s = next(tries, None)
                if pause_s is None:
                    raise ConnectionFailedError(str(error)) from error
                time.sleep(pause_s)

    def _events(self, offset: int) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
        query = {"offset": offset, "encoding": "base64"}
        with self._channel.stream("GET", f"{self._path}/output", params=query) as answer:
            yield from _parsed(answer.iter_lines())

    def wait(self) -> Exited:
        """Return once it has ended."""
        for event in self.events(self.info().raw["outputBytes"]):
            if isinstance(event, Exited):
                return event
        raise ConnectionFailedError("the server did not tell the end of the process")

    def write(self, data: bytes | str) -> None:
        """Write to its input, and return once all of it is written."""
        left = data.encode() if isinstance(data, str) else data
        while left:
            body = {"data": base64.b64encode(left[:_INPUT]).decode(), "encoding": "base64"}
            answer = self._channel.ask("POST", f"{self._path}/stdin", json=body)
            left = left[answer["data"]["written"] :]

    def close_stdin(self) -> None:
        """End its input."""
        self._channel.ask("POST", f"{self._path}/stdin", json={"close": True})

    def signal(self, signal: str | int = "SIGTERM", *, everything: bool = False) -> None:
        """Send it a signal, or everything that it has started."""
        body = {"signal": signal, "everything": everything}
        self._channel.ask("POST", f"{self._path}/signal", json=body)

    def resize(self, columns: int, rows: int) -> None:
        """Tell it that its terminal has another size."""
        body = {"cols": columns, "rows": rows}
        self._channel.ask("POST", f"{self._path}/resize", json=body)


class Processes:
    """The processes of one sandbox."""

    def __init__(self, channel: Channel, sandbox_path: str) -> None:
        self._channel = channel
        self._path = f"{sandbox_path}/processes"

    def start(self, command: str | Sequence[str], **options: Any) -> Process:
        """Start a process: a line for the shell, or a program with its arguments.

        `options` are fields of the HTTP API, such as `cwd`, `env`, `user`, `tag`, `stdin`, `pty`.
        """
        what = {"command": command} if isinstance(command, str) else {"argv": list(command)}
        made = self._channel.ask("POST", self._path, json={**what, **options})["data"]
        return Process(self._channel, f"{self._path}/{made['pid']}")

    def get(self, process: int | str) -> Process:
        """Return a process by its pid or tag; whether there is one shows when it is used."""
        return Process(self._channel, f"{self._path}/{process}")

    def list(self) -> list[ProcessInfo]:
        """Return the processes, oldest first; those that ended for ten minutes."""
        return [_info(one) for one in self._channel.ask("GET", self._path)["data"]]


def _parsed(lines: Iterable[str]) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Yield the events of a stream: name, id and data."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        if "data" in fields:
            number = int(fields["id"]) if "id" in fields else None
            yield fields.get("event", ""), number, json.loads(fields["data"])
        fields = {}


def _info(raw: Mapping[str, Any]) -> ProcessInfo:
    return ProcessInfo(
        pid=raw["pid"],
        tag=raw["tag"],
        command=raw["command"],
        status=raw["status"],
        exit_code=raw["exitCode"],
        raw=raw,
    )
