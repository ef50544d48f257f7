"""The synchronous client: `Sandyard` is a connection to a server, `Sandbox` one sandbox."""

import builtins
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, Literal, Self, Unpack, overload

from sandyard.client import calls
from sandyard.client.code import Context, Contexts, Shown, is_absent, name_of
from sandyard.client.connection import Connection
from sandyard.client.desktop import Desktop
from sandyard.client.errors import NotFoundError, NotReadyError, SandyardError, StillStartingError
from sandyard.client.files import Files
from sandyard.client.models import (
    CodeResult,
    Cost,
    ExecResult,
    Exited,
    PreviewUrl,
    ProcessEvent,
    RemotePath,
    SandboxFacts,
    Snapshot,
    SshAccess,
)
from sandyard.client.options import (
    BackgroundOptions,
    ChangeOptions,
    CreateOptions,
    ListOptions,
    listing_options,
)
from sandyard.client.processes import Process, Processes, pour
from sandyard.client.streams import Statuses
from sandyard.client.terminals import SHELL, Terminal

BROKEN = frozenset({"failed", "error", "destroyed"})
Told = Callable[[str], object]


class Sandyard(Connection):
    """A connection to a server. Use it as a context manager, or call `close`.

    URL and key default to SANDYARD_URL and SANDYARD_API_KEY, then to the command line's
    configuration, in which `profile` names a section. Idempotent calls are retried up to
    `retries` times.

    Raises:
        ConfigError: no server is configured.
    """

    @listing_options
    def create(
        self,
        template: str | None = None,
        *,
        wait_s: float = 60.0,
        idempotency_key: str | None = None,
        **options: Unpack[CreateOptions],
    ) -> "Sandbox":
        """Create a sandbox. See `CreateOptions` for the options.

        Returns when the sandbox is running, or after `wait_s` seconds, 60 at most. Repeating a call
        with the same `idempotency_key` and options within 24 hours returns the first result.
        """
        raw = self._transport.send(calls.create(template, wait_s, idempotency_key, options))
        return Sandbox(self, raw, is_created=True)

    def get(self, reference: str) -> "Sandbox":
        """Return a sandbox by id or name."""
        return self._sandbox(calls.get(reference))

    @listing_options
    def list(self, **wanted: Unpack[ListOptions]) -> Iterator["Sandbox"]:
        """Yield all sandboxes, newest first, or those that are wanted. See `ListOptions`."""
        query = calls.list_query(wanted)
        for one in self._pages("/v1/sandboxes", query, calls.sandbox_of):
            yield Sandbox(self, one)

    @listing_options
    def page(
        self, cursor: str | None = None, *, limit: int = 100, **wanted: Unpack[ListOptions]
    ) -> tuple[builtins.list["Sandbox"], str | None]:
        """Return a page of what `list` yields, and the cursor of the next, None after the last."""
        query = {**calls.list_query(wanted), "limit": limit}
        call = calls.page("/v1/sandboxes", query, cursor, calls.sandbox_of)
        found, following = self._transport.send(call)
        return [Sandbox(self, one) for one in found], following

    def delete(self, reference: str) -> None:
        """Delete a sandbox and wait until it is gone."""
        self._transport.send(calls.delete(reference))

    def execute(
        self,
        reference: str,
        command: str | Sequence[str],
        *,
        timeout_s: float | None = calls.EXEC_S,
        cwd: RemotePath | None = None,
        make_cwd: bool = False,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        user: str | int | None = None,
    ) -> ExecResult:
        """Run a command in a sandbox and return its result. A string is a shell command line, a
        sequence is a program and its arguments. `timeout_s=None` means no limit."""
        if timeout_s is None or not calls.is_one_request(timeout_s, stdin):
            return self.get(reference).exec(
                command,
                timeout_s=timeout_s,
                cwd=cwd,
                make_cwd=make_cwd,
                env=env,
                stdin=stdin,
                user=user,
            )
        call = calls.execute(
            reference,
            command,
            timeout_s=timeout_s,
            cwd=cwd,
            make_cwd=make_cwd,
            env=env,
            stdin=stdin,
            user=user,
        )
        return self._transport.send(call)

    def pause(self, reference: str) -> "Sandbox":
        """Pause a sandbox: save memory and processes to disk. Return it once its memory is free."""
        self._transport.send(calls.act(reference, "pause"))
        return self.get(reference)

    def resume(self, reference: str) -> "Sandbox":
        """Resume a paused sandbox and wait until it is running."""
        self._transport.send(calls.act(reference, "resume"))
        return self.get(reference)

    def restart(self, reference: str) -> "Sandbox":
        """Reboot a sandbox from its disk, even if it is unresponsive. Memory is lost."""
        self._transport.send(calls.act(reference, "restart", safe=False))
        return self.get(reference)

    def logs(self, reference: str) -> str:
        """Return the end of a sandbox's console log."""
        return self._transport.send(calls.logs(reference))

    def touch(self, reference: str) -> "Sandbox":
        """Reset the idle timer of a sandbox."""
        return self._sandbox(calls.act(reference, "touch"))

    @listing_options
    def change(self, reference: str, **changes: Unpack[ChangeOptions]) -> "Sandbox":
        """Change a sandbox. See `ChangeOptions` for the options."""
        return self._sandbox(calls.change(reference, changes))

    def fork(
        self, reference: str, count: int = 1, *, name: str | None = None
    ) -> builtins.list["Sandbox"]:
        """Create sandboxes from the current state of this one: files, memory and processes."""
        made = self._transport.send(calls.fork(reference, count, name))
        return [Sandbox(self, one, is_created=True) for one in made]

    def snapshot(self, reference: str, name: str | None = None) -> Snapshot:
        """Save the current state of a sandbox, which keeps running."""
        return self._transport.send(calls.snapshot(reference, name))

    def roll_back(self, reference: str, snapshot: str) -> "Sandbox":
        """Restore a sandbox to one of its snapshots. Its current state is lost."""
        return self._sandbox(calls.roll_back(reference, snapshot))

    def url(
        self, reference: str, port: int, *, cookie: bool = False, ttl: int | None = None
    ) -> PreviewUrl:
        """Return a preview URL of a port. Anyone who has the URL can use it.

        The token is in the host name, or with `cookie` in the query, and then in a cookie of the
        browser. The URL is valid for at least `ttl` seconds; the default is the server's setting.
        """
        return self._transport.send(calls.url(reference, port, cookie=cookie, ttl=ttl))

    def ssh(self, reference: str) -> SshAccess:
        """Return how to log in to a sandbox by SSH."""
        return self._transport.send(calls.ssh(reference))

    def cost(self, reference: str) -> Cost:
        """Return what a sandbox costs."""
        return self._transport.send(calls.cost(reference))

    def network(self, reference: str) -> Mapping[str, Any]:
        """Return what a sandbox may reach."""
        return self._transport.send(calls.network(reference))

    def set_network(
        self,
        reference: str,
        *,
        egress: str = "allow",
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        inspect: Sequence[str] = (),
        inject: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """Replace what a sandbox may reach; see `ChangeOptions.network`. The rules are in force
        when this returns."""
        rules = {
            "egress": egress, "allow": list(allow), "deny": list(deny),
            "inspect": list(inspect), "inject": [dict(one) for one in inject],
        }  # fmt: skip
        return self._transport.send(calls.set_network(reference, rules))

    def connections(
        self, reference: str, *, since: float | None = None
    ) -> builtins.list[Mapping[str, Any]]:
        """Return what a sandbox with network rules reached or was refused, oldest first: the
        latest, or those after a time, in seconds since 1970."""
        found: builtins.list[Mapping[str, Any]] = self._transport.send(
            calls.connections(reference, since)
        )
        return found

    def stats(self, reference: str) -> Mapping[str, float]:
        """Return a sandbox's current resource usage."""
        return self._transport.send(calls.stats(reference))

    def files(self, reference: str, *, user: str | int = "root") -> Files:
        """Return the files of a sandbox, accessed as `user`."""
        return Files(self._transport, calls.sandbox_path(reference), str(user))

    def desktop(self, reference: str) -> Desktop:
        """Return the screen of a sandbox with a desktop template."""
        return Desktop(self._transport, calls.sandbox_path(reference))

    def processes(self, reference: str) -> Processes:
        """Return the processes of a sandbox. They keep running when the client disconnects."""
        return Processes(self._transport, calls.sandbox_path(reference))

    def contexts(self, reference: str) -> Contexts:
        """Return the interpreters of a sandbox, which keep what their code defined."""
        return Contexts(self._transport, calls.sandbox_path(reference))

    def statuses(self, reference: str) -> Iterator["Sandbox"]:
        """Yield a sandbox now, and after each change of its status, until it is deleted."""
        for one in self._transport.follow(Statuses(calls.sandbox_path(reference))):
            yield Sandbox(self, one)

    def _sandbox(self, call: calls.Call[calls.Raw]) -> "Sandbox":
        return Sandbox(self, self._transport.send(call))


class Sandbox(SandboxFacts):
    """A sandbox.

    `Sandbox.create()` creates one. A `with` block deletes it at the end::

        with Sandbox.create() as sbx:
            print(sbx.exec("uname -a").stdout)

    `Sandbox.connect()` returns an existing one. A `with` block only closes the connection to it.
    """

    def __init__(
        self,
        client: Sandyard,
        raw: Mapping[str, Any],
        *,
        owns_client: bool = False,
        is_created: bool = False,
    ) -> None:
        super().__init__(raw)
        self._client = client
        self._owns_client = owns_client
        self._is_created = is_created
        self._contexts: dict[str, Context] = {}
        self._turn = threading.Lock()

    @classmethod
    @listing_options
    def create(
        cls,
        template: str | None = None,
        *,
        client: Sandyard | None = None,
        wait_s: float = 60.0,
        idempotency_key: str | None = None,
        **options: Unpack[CreateOptions],
    ) -> "Sandbox":
        """Create a sandbox and wait until it is running. See `Sandyard.create`.

        Used in a `with` block, it is deleted at the end of the block. Without a `client` it opens a
        connection to the configured server.

        Raises:
            NotReadyError: it did not start in time. It was deleted, unless the caller passed an
                `idempotency_key`.
        """
        own = client or Sandyard()
        # The same key returns the same sandbox, so one whose answer was lost can be deleted. If
        # the caller chose the key, the sandbox is the caller's, too.
        is_new, key = idempotency_key is None, idempotency_key or str(uuid.uuid4())
        until = time.monotonic() + wait_s
        made: Sandbox | None = None
        try:
            made = own.create(template, wait_s=wait_s, idempotency_key=key, **options)
            box = cls(own, made.raw, owns_client=client is None, is_created=True)
            return box.wait_until_ready(until - time.monotonic())
        except BaseException as error:
            with suppress(SandyardError):
                if is_new and made is None and not isinstance(error, Exception):
                    made = own.create(template, wait_s=0, idempotency_key=key, **options)
                if is_new and made is not None:
                    made.delete()
            if client is None:
                own.close()
            raise

    @classmethod
    def connect(cls, reference: str, *, client: Sandyard | None = None) -> "Sandbox":
        """Return an existing sandbox, by id or name.

        Used in a `with` block, only the connection is closed at the end of the block. The sandbox
        is kept: call `delete` to delete it.
        """
        own = client or Sandyard()
        try:
            return cls(own, own.get(reference).raw, owns_client=client is None)
        except BaseException:
            if client is None:
                own.close()
            raise

    def __enter__(self) -> Self:
        """Return this sandbox."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the sandbox if this object created it and it still exists. Close the connection
        if it opened one."""
        try:
            if self._is_created:
                self.delete()
        except NotFoundError:
            pass  # by another client, or by its expiry
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection if this sandbox opened it. The sandbox is not deleted."""
        if self._owns_client:
            self._client.close()

    def refresh(self) -> Self:
        """Refresh from the server."""
        self.raw = self._client.get(self.id).raw
        return self

    def is_running(self) -> bool:
        """Ask the server whether it runs. A sandbox that was deleted does not."""
        try:
            return (self.refresh()).status == "running"
        except NotFoundError:
            return False

    def set_timeout(self, seconds: int) -> Self:
        """Let it end so many seconds from now, whatever was set before; 0: never."""
        return self.change(expires_in=seconds)

    def wait_until_ready(self, limit_s: float = 60.0) -> Self:
        """Wait until the sandbox is running.

        Raises:
            NotReadyError: it failed to start, or not in time.
        """
        until = time.monotonic() + limit_s
        while self.status != "running":
            why = str((self.raw.get("statusReason") or {}).get("message", ""))
            said = f"the sandbox {self.id} is {self.status}{why and f': {why}'}"
            if self.status in BROKEN:
                raise NotReadyError(said)
            if time.monotonic() >= until:
                raise StillStartingError(said)
            time.sleep(0.1)
            self.refresh()
        return self

    @overload
    def exec(
        self,
        command: str | Sequence[str],
        *,
        background: Literal[False] = False,
        timeout_s: float | None = ...,
        cwd: RemotePath | None = None,
        make_cwd: bool = False,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        user: str | int | None = None,
        check: bool = False,
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
    ) -> ExecResult: ...

    @overload
    def exec(
        self,
        command: str | Sequence[str],
        *,
        background: Literal[True],
        **options: Unpack[BackgroundOptions],
    ) -> Process: ...

    def exec(
        self,
        command: str | Sequence[str],
        *,
        background: bool = False,
        timeout_s: float | None = calls.EXEC_S,
        cwd: RemotePath | None = None,
        make_cwd: bool = False,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        user: str | int | None = None,
        check: bool = False,
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
    ) -> ExecResult | Process:
        """Run a command and return its result. A string is a shell command line, a sequence is a
        program and its arguments.

        In the `background` it is started only: the result is its process, and there is no time
        limit unless one is given. Otherwise `on_stdout` and `on_stderr` receive output as text
        while the command runs; `timeout_s=None` means no limit. The result has up to 16 MiB of each
        stream. A relative `cwd` is below /workspace.

        Raises:
            CommandFailedError: the exit code is not 0 and `check` is set.
        """
        if background:
            limit_s = None if timeout_s is calls.EXEC_S else timeout_s
            options = calls.run_options(limit_s, cwd, env, user, make_cwd=make_cwd, has_stdin=False)
            return self.processes.start(command, **options)
        line = calls.line_of(command)
        if calls.is_too_long(line):
            path = calls.new_script()
            self.files_as(user or "root").write(
                path,
                line,
                mode="0600" if user else "0644",  # the template's user may be any
            )
            line = calls.line_from_file(path)
        is_quiet = on_stdout is None and on_stderr is None
        if is_quiet and timeout_s is not None and calls.is_one_request(timeout_s, stdin):
            result = self._client.execute(
                self.id,
                line,
                timeout_s=timeout_s,
                cwd=cwd,
                make_cwd=make_cwd,
                env=env,
                stdin=stdin,
                user=user,
            )
            return calls.checked(result, command, check=check)
        heard = calls.Heard(on_stdout, on_stderr)
        events = self.run(
            line,
            timeout_s=timeout_s,
            cwd=cwd,
            make_cwd=make_cwd,
            env=env,
            stdin=stdin,
            user=user,
        )
        with closing(events):
            for event in events:
                heard.feed(event)
                heard.told.call()
        return calls.checked(heard.result(), command, check=check)

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        cwd: RemotePath | None = None,
        make_cwd: bool = False,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        user: str | int | None = None,
    ) -> Generator[ProcessEvent, None, None]:
        """Run a command and yield its output as it is printed, and finally its exit.

        The command is ended if the caller stops iterating.
        """
        options = calls.run_options(
            timeout_s,
            cwd,
            env,
            user,
            make_cwd=make_cwd,
            has_stdin=stdin is not None,
        )
        process = self.processes.start(command, **options)
        is_over, is_enough = False, threading.Event()
        try:
            if stdin is not None:
                # Concurrently: a process whose output is not read may not read its input.
                given = (process, stdin, is_enough)
                threading.Thread(target=pour, args=given, daemon=True).start()
            for event in process.events():
                is_over = isinstance(event, Exited)
                yield event
        except SandyardError:
            # Paused, say, or deleted: ending the process would resume the sandbox.
            is_over = True
            raise
        finally:
            is_enough.set()
            if not is_over:
                with suppress(SandyardError):
                    process.signal("SIGKILL", everything=True)

    def run_code(
        self,
        code: str,
        *,
        language: str = "python",
        context: Context | str | None = None,
        timeout_s: float = 60.0,
        stdin: str = "",
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
        on_result: Shown | None = None,
    ) -> CodeResult:
        """Run Python, JavaScript (`node`) or shell (`bash`) code in a persistent interpreter: later
        calls see earlier definitions. See `Context.run`.

        Without a `context`, or its id, this object creates one for each language.
        """
        own = self._contexts.get(name_of(language)) if context is None else context
        if isinstance(own, str):
            own = self.contexts.get(own)

        def run(chosen: Context) -> CodeResult:
            return chosen.run(
                code,
                timeout_s=timeout_s,
                stdin=stdin,
                on_stdout=on_stdout,
                on_stderr=on_stderr,
                on_result=on_result,
            )

        if own is not None:
            try:
                return run(own)
            except NotFoundError as error:
                if context is not None or not is_absent(error):
                    raise  # otherwise it ended with the sandbox's machine
        with self._turn:
            if self._contexts.get(name_of(language)) in (own, None):
                self._contexts[name_of(language)] = self.contexts.create(language)
        return run(self._contexts[name_of(language)])

    @property
    def contexts(self) -> Contexts:
        """Its interpreters, which keep what their code defined."""
        return self._client.contexts(self.id)

    def open_terminal(
        self,
        on_output: Callable[[bytes], object],
        command: str | Sequence[str] | None = None,
        *,
        columns: int = 80,
        rows: int = 24,
        cwd: RemotePath | None = None,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
    ) -> Terminal:
        """Start a program on a terminal; without a `command`, a login shell.

        `on_output` receives what it prints, with the terminal's control sequences. Type with
        `write`, and wait for its end with `wait`.
        """
        process = self.processes.start(
            command or SHELL,
            pty={"cols": columns, "rows": rows},
            cwd=cwd,
            env=dict(env or {}),
            user=user,
        )
        return Terminal(process, on_output)

    @property
    def files(self) -> Files:
        """Its files, accessed as root."""
        return self._client.files(self.id)

    def files_as(self, user: str | int) -> Files:
        """Return its files, accessed as another user."""
        return self._client.files(self.id, user=user)

    @property
    def desktop(self) -> Desktop:
        """Its screen, if it has a desktop template."""
        return self._client.desktop(self.id)

    @property
    def processes(self) -> Processes:
        """Its processes. They keep running when the client disconnects."""
        return self._client.processes(self.id)

    def pause(self) -> Self:
        """Pause it: save memory and processes to disk, and free the host's memory."""
        return self._now(self._client.pause(self.id))

    def resume(self) -> Self:
        """Resume it."""
        return self._now(self._client.resume(self.id))

    def restart(self) -> Self:
        """Reboot it from its disk. Memory is lost."""
        return self._now(self._client.restart(self.id))

    def fork(self, count: int = 1, *, name: str | None = None) -> list["Sandbox"]:
        """Create sandboxes from the current state of this one: files, memory and processes."""
        return self._client.fork(self.id, count, name=name)

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Save its current state. It keeps running."""
        return self._client.snapshot(self.id, name)

    def roll_back(self, snapshot: str) -> Self:
        """Restore it to one of its snapshots. Its current state is lost."""
        return self._now(self._client.roll_back(self.id, snapshot))

    def url(self, port: int, *, cookie: bool = False, ttl: int | None = None) -> PreviewUrl:
        """Return a preview URL of one of its ports. See `Sandyard.url`."""
        return self._client.url(self.id, port, cookie=cookie, ttl=ttl)

    def ssh(self) -> SshAccess:
        """Return how to log in to it by SSH."""
        return self._client.ssh(self.id)

    def cost(self) -> Cost:
        """Return what it has cost since it was created, and what it costs now."""
        return self._client.cost(self.id)

    def network(self) -> Mapping[str, Any]:
        """Return what it may reach."""
        return self._client.network(self.id)

    def set_network(
        self,
        *,
        egress: str = "allow",
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        inspect: Sequence[str] = (),
        inject: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """Replace what it may reach; see `Sandyard.set_network`."""
        return self._client.set_network(
            self.id, egress=egress, allow=allow, deny=deny, inspect=inspect, inject=inject
        )

    def connections(self, *, since: float | None = None) -> builtins.list[Mapping[str, Any]]:
        """Return what it reached or was refused; see `Sandyard.connections`."""
        return self._client.connections(self.id, since=since)

    def stats(self) -> Mapping[str, float]:
        """Return its current resource usage."""
        return self._client.stats(self.id)

    def logs(self) -> str:
        """Return the end of its console log."""
        return self._client.logs(self.id)

    def touch(self) -> Self:
        """Reset its idle timer."""
        return self._now(self._client.touch(self.id))

    @listing_options
    def change(self, **changes: Unpack[ChangeOptions]) -> Self:
        """Change a sandbox. See `ChangeOptions` for the options."""
        return self._now(self._client.change(self.id, **changes))

    def delete(self) -> None:
        """Delete it and wait until it is gone."""
        self._client.delete(self.id)

    def _now(self, known: "Sandbox") -> Self:
        self.raw = known.raw
        return self
