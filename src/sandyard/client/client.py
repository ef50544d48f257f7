"""The client."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from sandyard.client.errors import ApiError, ConnectionFailedError
from sandyard.client.files import Files
from sandyard.client.processes import Processes

_MARGIN_S = 90.0


@dataclass(frozen=True)
class Sandbox:
    """A sandbox as the server told of it; `raw` has every field."""

    id: str
    name: str | None
    status: str
    template: str
    created_at: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as the server told of it; `raw` has every field."""

    id: str
    name: str | None
    sandbox_id: str
    size_bytes: int
    created_at: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class ExecResult:
    """How a command ended. Text has U+FFFD for what is not UTF-8; the bytes are exact."""

    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)
    exit_code: int
    duration_ms: int
    timed_out: bool
    truncated: bool

    @property
    def stdout(self) -> str:
        """What it printed on standard output."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it printed on standard error."""
        return self.stderr_bytes.decode(errors="replace")


class Sandyard:
    """A connection to a server; use it as a context manager or call `close`."""

    def __init__(self, url: str, api_key: str) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(_MARGIN_S, connect=5.0),
        )

    def __enter__(self) -> Self:
        """Return this client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def create(
        self,
        template: str | None = None,
        *,
        wait_s: int = 0,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Sandbox:
        """Create a sandbox; `options` are the fields of the HTTP API, such as `name` or `env`.

        With `wait_s`, return once it runs or so many seconds have gone by. The same
        `idempotency_key` and options within a day return what was made the first time.
        """
        body = options if template is None else {"template": template, **options}
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        answer = self.ask(
            "POST", "/v1/sandboxes", params={"wait": wait_s}, json=body, headers=headers
        )
        return _sandbox(answer["data"])

    def get(self, reference: str) -> Sandbox:
        """Return a sandbox by id or name."""
        return _sandbox(self.ask("GET", _path(reference))["data"])

    def list(self, *, status: str | None = None, tags: Sequence[str] = ()) -> Iterator[Sandbox]:
        """Yield all sandboxes, newest first."""
        query: dict[str, Any] = {"tag": list(tags)}
        if status is not None:
            query["status"] = status
        while True:
            page = self.ask("GET", "/v1/sandboxes", params=query)
            yield from map(_sandbox, page["data"])
            if not page["hasMore"]:
                return
            query["cursor"] = page["nextCursor"]

    def delete(self, reference: str) -> None:
        """Delete a sandbox and return when it is gone."""
        self.ask("DELETE", _path(reference))

    def execute(
        self,
        reference: str,
        command: str,
        *,
        timeout_ms: int = 30_000,
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        user: str = "root",
    ) -> ExecResult:
        """Run a command in a sandbox and return how it ended."""
        body = {
            "command": command,
            "timeout": timeout_ms,
            "cwd": cwd,
            "env": dict(env or {}),
            "user": user,
            "encoding": "base64",
        }
        if stdin is not None:
            given = stdin.encode() if isinstance(stdin, str) else stdin
            body |= {"stdin": base64.b64encode(given).decode(), "stdinEncoding": "base64"}
        data = self.ask(
            "POST", _path(reference) + "/exec", json=body, timeout=timeout_ms / 1000 + _MARGIN_S
        )["data"]
        return ExecResult(
            stdout_bytes=base64.b64decode(data["stdout"]),
            stderr_bytes=base64.b64decode(data["stderr"]),
            exit_code=data["exitCode"],
            duration_ms=data["durationMs"],
            timed_out=data["timedOut"],
            truncated=data["truncated"],
        )

    def pause(self, reference: str) -> Sandbox:
        """Save a sandbox to disk, processes and all, and return it when its memory is free."""
        self.ask("POST", _path(reference) + "/pause")
        return self.get(reference)

    def resume(self, reference: str) -> Sandbox:
        """Let a paused sandbox go on where it stood, and return it when it runs."""
        self.ask("POST", _path(reference) + "/resume")
        return self.get(reference)

    def restart(self, reference: str) -> Sandbox:
        """Boot a sandbox from its own disk, also one that does not answer, and return it."""
        self.ask("POST", _path(reference) + "/restart")
        return self.get(reference)

    def logs(self, reference: str) -> str:
        """Return the last of what a sandbox's machine printed on its console."""
        return str(self.ask("GET", _path(reference) + "/logs")["data"]["console"])

    def touch(self, reference: str) -> Sandbox:
        """Count as a use of a sandbox, so that it is not paused for being idle."""
        return _sandbox(self.ask("POST", _path(reference) + "/touch")["data"])

    def change(self, reference: str, **changes: Any) -> Sandbox:
        """Change fields of the HTTP API, such as `name`, `tags` or `idleTimeout`."""
        return _sandbox(self.ask("PATCH", _path(reference), json=changes)["data"])

    def fork(self, reference: str, count: int = 1) -> Sequence[Sandbox]:
        """Make sandboxes that begin as this one is now: files, memory and processes."""
        made = self.ask("POST", _path(reference) + "/fork", json={"count": count})
        return [_sandbox(one) for one in made["data"]]

    def snapshot(self, reference: str, name: str | None = None) -> Snapshot:
        """Save a sandbox as it is now; it goes on running."""
        body = {} if name is None else {"name": name}
        made = self.ask("POST", _path(reference) + "/snapshots", json=body)
        return _snapshot(made["data"])

    def roll_back(self, reference: str, snapshot: str) -> Sandbox:
        """Put a sandbox back to one of its snapshots; what it was until then is lost."""
        body = {"snapshotId": snapshot}
        return _sandbox(self.ask("POST", _path(reference) + "/rollback", json=body)["data"])

    def snapshots(self) -> Iterator[Snapshot]:
        """Yield all snapshots, newest first."""
        query: dict[str, Any] = {}
        while True:
            page = self.ask("GET", "/v1/snapshots", params=query)
            yield from map(_snapshot, page["data"])
            if not page["hasMore"]:
                return
            query["cursor"] = page["nextCursor"]

    def delete_snapshot(self, reference: str) -> None:
        """Remove a snapshot; what was made from it lives on."""
        self.ask("DELETE", f"/v1/snapshots/{quote(reference, safe='')}")

    def stats(self, reference: str) -> Mapping[str, float]:
        """Return a sandbox's figures as of now."""
        figures: Mapping[str, float] = self.ask("GET", _path(reference) + "/stats")["data"]["stats"]
        return figures

    def files(self, reference: str, *, user: str = "root") -> Files:
        """Return the files of a sandbox, as one of its users sees them."""
        return Files(self, _path(reference), user)

    def processes(self, reference: str) -> Processes:
        """Return the processes of a sandbox, which live on when whoever started them has gone."""
        return Processes(self, _path(reference))

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """Ask for an answer that is read as it comes.

        Raises:
            ApiError: the server refused.
            ConnectionFailedError: it could not be reached, or broke off.
        """
        try:
            with self._http.stream(method, path, **options) as response:
                if not response.is_success:
                    response.read()
                    raise _error_of(response)
                yield response
        except httpx.HTTPError as error:
            raise self._failed(error) from error

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Ask for anything of the HTTP API, and return the answer's JSON.

        Raises:
            ApiError: the server refused.
            ConnectionFailedError: it could not be reached, or broke off.
        """
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._failed(error) from error
        if response.is_success:
            return response.json()
        raise _error_of(response)

    def _failed(self, error: httpx.HTTPError) -> ConnectionFailedError:
        return ConnectionFailedError(
            f"cannot reach {self._http.base_url}: {str(error) or type(error).__name__}"
        )


def _path(reference: str) -> str:
    return f"/v1/sandboxes/{quote(reference, safe='')}"


def _sandbox(data: Mapping[str, Any]) -> Sandbox:
    return Sandbox(
        id=data["id"],
        name=data["name"],
        status=data["status"],
        template=data["template"],
        created_at=data["createdAt"],
        raw=data,
    )


def _snapshot(data: Mapping[str, Any]) -> Snapshot:
    return Snapshot(
        id=data["id"],
        name=data["name"],
        sandbox_id=data["sandboxId"],
        size_bytes=data["sizeBytes"],
        created_at=data["createdAt"],
        raw=data,
    )


def _error_of(response: httpx.Response) -> ApiError:
    try:
        body = response.json()["error"]
        return ApiError(
            str(body["message"]),
            status=response.status_code,
            code=str(body["code"]),
            request_id=str(body.get("requestId", "")),
            details=body.get("details"),
        )
    except (ValueError, KeyError, TypeError):
        # Not ours: a proxy in between, say.
        return ApiError(
            f"the server answered {response.status_code}: {response.text[:200]}",
            status=response.status_code,
            code="unknown",
            request_id="",
        )
