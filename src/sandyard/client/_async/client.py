"""`AsyncSandyard` is a connection to a server, `AsyncSandbox` one sandbox."""

import builtins
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, Literal, Self, Unpack, overload

from sandyard.client import calls
from sandyard.client._async.code import AsyncContext, AsyncContexts
from sandyard.client._async.concurrency import Lock, alongside, begun, call_back, finish, sleep
from sandyard.client._async.connection import AsyncConnection
from sandyard.client._async.desktop import AsyncDesktop
from sandyard.client._async.local import AsyncFiles
from sandyard.client._async.network import AsyncFormerNames, AsyncNetwork
from sandyard.client._async.processes import AsyncProcess, AsyncProcesses
from sandyard.client._async.terminals import AsyncTerminal
from sandyard.client.contexts import OnText, Shown, is_absent, name_of
from sandyard.client.errors import NotFoundError, NotReadyError, SandyardError, StillStartingError
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
from sandyard.client.streams import Statuses

BROKEN = frozenset({"failed", "error", "destroyed"})


class AsyncSandyard(AsyncConnection):
    """A connection to a server. Use it as a context manager, or call `close`.

    URL and key default to SANDYARD_URL and SANDYARD_API_KEY, then to the command line's
    configuration, in which `profile` names a section. Idempotent calls are retried up to
    `retries` times.

    Raises:
        ConfigError: no server is configured.
    """

    @listing_options
    async def create(
        self,
        template: str | None = None,
        *,
        wait_s: float = 60.0,
        idempotency_key: str | None = None,
        **options: Unpack[CreateOptions],
    ) -> "AsyncSandbox":
        """Create a sandbox. See `CreateOptions` for the options.

        Returns when the sandbox is running, or after `wait_s` seconds, 60 at most. Repeating a call
        with the same `idempotency_key` and options within 24 hours returns the first result.
        """
        call = calls.create(template, wait_s, idempotency_key, options)
        return AsyncSandbox(self, await self._transport.send(call), is_created=True)

    async def get(self, reference: str) -> "AsyncSandbox":
        """Return a sandbox by id or name."""
        return await self._sandbox(calls.get(reference))

    @listing_options
    async def list(self, **wanted: Unpack[ListOptions]) -> AsyncIterator["AsyncSandbox"]:
        """Yield all sandboxes, newest first, or those that are wanted. See `ListOptions`."""
        query = calls.list_query(wanted)
        async for one in self._pages("/v1/sandboxes", query, calls.sandbox_of):
            yield AsyncSandbox(self, one)

    @listing_options
    async def page(
        self, cursor: str | None = None, *, limit: int = 100, **wanted: Unpack[ListOptions]
    ) -> tuple[builtins.list["AsyncSandbox"], str | None]:
        """Return a page of what `list` yields, and the cursor of the next, None after the last."""
        query = {**calls.list_query(wanted), "limit": limit}
        call = calls.page("/v1/sandboxes", query, cursor, calls.sandbox_of)
        found, following = await self._transport.send(call)
        return [AsyncSandbox(self, one) for one in found], following

    async def delete(self, reference: str) -> None:
        """Delete a sandbox and wait until it is gone."""
        await self._transport.send(calls.delete(reference))

    async def execute(
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
            sandbox = await self.get(reference)
            return await sandbox.exec(
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
        return await self._transport.send(call)

    async def pause(self, reference: str) -> "AsyncSandbox":
        """Pause a sandbox: save memory and processes to disk. Return it once its memory is free."""
        await self._transport.send(calls.act(reference, "pause"))
        return await self.get(reference)

    async def resume(self, reference: str) -> "AsyncSandbox":
        """Resume a paused sandbox and wait until it is running."""
        await self._transport.send(calls.act(reference, "resume"))
        return await self.get(reference)

    async def restart(self, reference: str) -> "AsyncSandbox":
        """Reboot a sandbox from its disk, even if it is unresponsive. Memory is lost."""
        await self._transport.send(calls.act(reference, "restart", safe=False))
        return await self.get(reference)

    async def logs(self, reference: str) -> str:
        """Return the end of a sandbox's console log."""
        return await self._transport.send(calls.logs(reference))

    async def touch(self, reference: str) -> "AsyncSandbox":
        """Reset the idle timer of a sandbox."""
        return await self._sandbox(calls.act(reference, "touch"))

    @listing_options
    async def change(self, reference: str, **changes: Unpack[ChangeOptions]) -> "AsyncSandbox":
        """Change a sandbox. See `ChangeOptions` for the options."""
        return await self._sandbox(calls.change(reference, changes))

    async def fork(
        self, reference: str, count: int = 1, *, name: str | None = None
    ) -> builtins.list["AsyncSandbox"]:
        """Create sandboxes from the current state of this one: files, memory and processes."""
        made = await self._transport.send(calls.fork(reference, count, name))
        return [AsyncSandbox(self, one, is_created=True) for one in made]

    async def snapshot(self, reference: str, name: str | None = None) -> Snapshot:
        """Save the current state of a sandbox, which keeps running."""
        return await self._transport.send(calls.snapshot(reference, name))

    async def roll_back(self, reference: str, snapshot: str) -> "AsyncSandbox":
        """Restore a sandbox to one of its snapshots. Its current state is lost."""
        return await self._sandbox(calls.roll_back(reference, snapshot))

    async def url(
        self, reference: str, port: int, *, cookie: bool = False, ttl: int | None = None
    ) -> PreviewUrl:
        """Return a preview URL of a port. Anyone who has the URL can use it.

        The token is in the host name, or with `cookie` in the query, and then in a cookie of the
        browser. The URL is valid for at least `ttl` seconds; the default is the server's setting.
        """
        return await self._transport.send(calls.url(reference, port, cookie=cookie, ttl=ttl))

    async def ssh(self, reference: str) -> SshAccess:
        """Return how to log in to a sandbox by SSH."""
        return await self._transport.send(calls.ssh(reference))

    async def cost(self, reference: str) -> Cost:
        """Return what a sandbox costs."""
        return await self._transport.send(calls.cost(reference))

    async def network(self, reference: str) -> Mapping[str, Any]:
        """Return what a sandbox may reach."""
        return await self.network_of(reference).rules()

    async def set_network(
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
        return await self.network_of(reference).replace(
            egress=egress, allow=allow, deny=deny, inspect=inspect, inject=inject
        )

    async def connections(
        self, reference: str, *, since: float | None = None
    ) -> builtins.list[Mapping[str, Any]]:
        """Return what a sandbox with network rules reached or was refused, oldest first: the
        latest, or those after a time, in seconds since 1970."""
        return await self.network_of(reference).connections(since=since)

    def network_of(self, reference: str) -> AsyncNetwork:
        """Return the network rules of a sandbox, and its connections."""
        return AsyncNetwork(self._transport, reference)

    async def stats(self, reference: str) -> Mapping[str, float]:
        """Return a sandbox's current resource usage."""
        return await self._transport.send(calls.stats(reference))

    def files(self, reference: str, *, user: str | int = "root") -> AsyncFiles:
        """Return the files of a sandbox, accessed as `user`."""
        return AsyncFiles(self._transport, calls.sandbox_path(reference), str(user))

    def desktop(self, reference: str) -> AsyncDesktop:
        """Return the screen of a sandbox with a desktop template."""
        return AsyncDesktop(self._transport, calls.sandbox_path(reference))

    def processes(self, reference: str) -> AsyncProcesses:
        """Return the processes of a sandbox. They keep running when the client disconnects."""
        return AsyncProcesses(self._transport, calls.sandbox_path(reference))

    def contexts(self, reference: str) -> AsyncContexts:
        """Return the interpreters of a sandbox, which keep what their code defined."""
        return AsyncContexts(self._transport, calls.sandbox_path(reference))

    async def statuses(self, reference: str) -> AsyncIterator["AsyncSandbox"]:
        """Yield a sandbox now, and after each change of its status, until it is deleted."""
        async for one in self._transport.follow(Statuses(calls.sandbox_path(reference))):
            yield AsyncSandbox(self, one)

    async def _sandbox(self, call: calls.Call[calls.Raw]) -> "AsyncSandbox":
        return AsyncSandbox(self, await self._transport.send(call))


class AsyncSandbox(SandboxFacts, AsyncFormerNames):
    """A sandbox.

    `AsyncSandbox.create()` creates one. An `async with` block deletes it at the end::

        async with await AsyncSandbox.create() as sbx:
            print((await sbx.exec("uname -a")).stdout)

    `AsyncSandbox.connect()` returns an existing one. An `async with` block only closes the
    connection to it.
    """

    def __init__(
        self,
        client: AsyncSandyard,
        raw: Mapping[str, Any],
        *,
        owns_client: bool = False,
        is_created: bool = False,
    ) -> None:
        super().__init__(raw)
        self._client = client
        self._owns_client = owns_client
        self._is_created = is_created
        self._contexts: dict[str, AsyncContext] = {}
        self._turn = Lock()

    @classmethod
    @listing_options
    async def create(
        cls,
        template: str | None = None,
        *,
        client: AsyncSandyard | None = None,
        wait_s: float = 60.0,
        idempotency_key: str | None = None,
        **options: Unpack[CreateOptions],
    ) -> "AsyncSandbox":
        """Create a sandbox and wait until it is running. See `AsyncSandyard.create`.

        Used in an `async with` block, it is deleted at the end of the block. Without a `client` it
        opens a connection to the configured server.

        Raises:
            NotReadyError: it did not start in time. It was deleted, unless the caller passed an
                `idempotency_key`.
        """
        own = client or AsyncSandyard()
        # The same key returns the same sandbox, so one whose answer was lost can be deleted. If
        # the caller chose the key, the sandbox is the caller's, too.
        is_new, key = idempotency_key is None, idempotency_key or str(uuid.uuid4())
        until = time.monotonic() + wait_s
        made: AsyncSandbox | None = None
        try:
            made = await own.create(template, wait_s=wait_s, idempotency_key=key, **options)
            box = cls(own, made.raw, owns_client=client is None, is_created=True)
            return await box.wait_until_ready(until - time.monotonic())
        except BaseException as error:
            is_unsure = is_new and made is None and not isinstance(error, Exception)

            async def undo() -> None:
                known = made
                try:
                    if is_unsure:
                        known = await own.create(template, wait_s=0, idempotency_key=key, **options)
                    if is_new and known is not None:
                        await known.delete()
                finally:
                    if client is None:
                        await own.close()

            await finish(undo)
            raise

    @classmethod
    async def connect(
        cls, reference: str, *, client: AsyncSandyard | None = None
    ) -> "AsyncSandbox":
        """Return an existing sandbox, by id or name.

        Used in an `async with` block, only the connection is closed at the end of the block. The
        sandbox is kept: call `delete` to delete it.
        """
        own = client or AsyncSandyard()
        try:
            return cls(own, (await own.get(reference)).raw, owns_client=client is None)
        except BaseException:
            if client is None:
                await own.close()
            raise

    async def __aenter__(self) -> Self:
        """Return this sandbox."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Delete the sandbox if this object created it and it still exists. Close the connection
        if it opened one."""
        # Another client, or its expiry, may have deleted it.
        await finish(self._leave, ignoring=NotFoundError)

    async def _leave(self) -> None:
        try:
            if self._is_created:
                await self.delete()
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection if this sandbox opened it. The sandbox is not deleted."""
        if self._owns_client:
            await self._client.close()

    async def refresh(self) -> Self:
        """Refresh from the server."""
        self.raw = (await self._client.get(self.id)).raw
        return self

    async def is_running(self) -> bool:
        """Ask the server whether it runs. A sandbox that was deleted does not."""
        try:
            return (await self.refresh()).status == "running"
        except NotFoundError:
            return False

    async def set_timeout(self, seconds: int) -> Self:
        """Let it end so many seconds from now, whatever was set before; 0: never."""
        return await self.change(expires_in=seconds)

    async def wait_until_ready(self, limit_s: float = 60.0) -> Self:
        """Wait until the sandbox is running.

        Raises:
            NotReadyError: it failed to start, or not in time.
        """
        until = time.monotonic() + limit_s
        while self.status != "running":
            why = str((self.raw.get("statusReason") or {}).get("message", ""))
            message = f"the sandbox {self.id} is {self.status}{why and f': {why}'}"
            if self.status in BROKEN:
                raise NotReadyError(message)
            if time.monotonic() >= until:
                raise StillStartingError(message)
            await sleep(0.1)
            await self.refresh()
        return self

    @overload
    async def exec(
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
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
    ) -> ExecResult: ...

    @overload
    async def exec(
        self,
        command: str | Sequence[str],
        *,
        background: Literal[True],
        **options: Unpack[BackgroundOptions],
    ) -> AsyncProcess: ...

    async def exec(
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
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
    ) -> ExecResult | AsyncProcess:
        """Run a command and return its result. A string is a shell command line, a sequence is a
        program and its arguments.

        In the `background` it is started only: the result is its process, and there is no time
        limit unless one is given. Otherwise `on_stdout` and `on_stderr` receive output as text
        while the command runs; `timeout_s=None` means no limit. The result has up to 16 MiB of each
        stream. A relative `cwd` is below /workspace. Callbacks may be coroutine functions.

        Raises:
            CommandFailedError: the exit code is not 0 and `check` is set.
        """
        if background:
            limit_s = None if timeout_s is calls.EXEC_S else timeout_s
            options = calls.run_options(limit_s, cwd, env, user, make_cwd=make_cwd, has_stdin=False)
            return await self.processes.start(command, **options)
        line = calls.line_of(command)
        if calls.is_too_long(line):
            path = calls.new_script()
            await self.files_as(user or "root").write(
                path,
                line,
                mode="0600" if user else "0644",  # the template's user may be any
            )
            line = calls.line_from_file(path)
        is_quiet = on_stdout is None and on_stderr is None
        if is_quiet and timeout_s is not None and calls.is_one_request(timeout_s, stdin):
            result = await self._client.execute(
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
        async with aclosing(events):
            async for event in events:
                heard.feed(event)
                await call_back(heard.callbacks)
        return calls.checked(heard.result(), command, check=check)

    async def run(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        cwd: RemotePath | None = None,
        make_cwd: bool = False,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        user: str | int | None = None,
    ) -> AsyncGenerator[ProcessEvent, None]:
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
        end = partial(AsyncProcess.signal, signal="SIGKILL", everything=True)
        process = await begun(lambda: self.processes.start(command, **options), undo=end)
        is_over = False
        try:
            async with AsyncExitStack() as held:
                if stdin is not None:
                    # Concurrently: a process whose output is not read may not read its input.
                    pouring = alongside(partial(process.pour_until, stdin))
                    await held.enter_async_context(pouring)
                async for event in process.events():
                    is_over = isinstance(event, Exited)
                    yield event
        except SandyardError:
            # Paused, say, or deleted: ending the process would resume the sandbox.
            is_over = True
            raise
        finally:
            if not is_over:
                await finish(lambda: end(process))

    async def run_code(
        self,
        code: str,
        *,
        language: str = "python",
        context: AsyncContext | str | None = None,
        timeout_s: float = 60.0,
        stdin: str = "",
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_result: Shown | None = None,
    ) -> CodeResult:
        """Run Python, JavaScript (`node`) or shell (`bash`) code in a persistent interpreter: later
        calls see earlier definitions. See `AsyncContext.run`.

        Without a `context`, or its id, this object creates one for each language.
        Callbacks may be coroutine functions.
        """
        own = self._contexts.get(name_of(language)) if context is None else context
        if isinstance(own, str):
            own = await self.contexts.get(own)

        async def run(chosen: AsyncContext) -> CodeResult:
            return await chosen.run(
                code,
                timeout_s=timeout_s,
                stdin=stdin,
                on_stdout=on_stdout,
                on_stderr=on_stderr,
                on_result=on_result,
            )

        if own is not None:
            try:
                return await run(own)
            except NotFoundError as error:
                if context is not None or not is_absent(error):
                    raise  # otherwise it ended with the sandbox's machine
        async with self._turn:
            if self._contexts.get(name_of(language)) in (own, None):
                self._contexts[name_of(language)] = await self.contexts.create(language)
        return await run(self._contexts[name_of(language)])

    @property
    def contexts(self) -> AsyncContexts:
        """Its interpreters, which keep what their code defined."""
        return self._client.contexts(self.id)

    async def open_terminal(
        self,
        on_output: Callable[[bytes], object],
        command: str | Sequence[str] | None = None,
        *,
        columns: int = 80,
        rows: int = 24,
        cwd: RemotePath | None = None,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
    ) -> AsyncTerminal:
        """Start a program on a terminal; without a `command`, a login shell.

        `on_output` receives what it prints, with the terminal's control sequences. Type with
        `write`, and wait for its end with `wait`. Callbacks may be coroutine functions.
        """
        process = await self.processes.start(
            command or calls.SHELL,
            pty={"cols": columns, "rows": rows},
            cwd=cwd,
            env=dict(env or {}),
            user=user,
        )
        return AsyncTerminal(process, on_output)

    @property
    def files(self) -> AsyncFiles:
        """Its files, accessed as root."""
        return self._client.files(self.id)

    def files_as(self, user: str | int) -> AsyncFiles:
        """Return its files, accessed as another user."""
        return self._client.files(self.id, user=user)

    @property
    def desktop(self) -> AsyncDesktop:
        """Its screen, if it has a desktop template."""
        return self._client.desktop(self.id)

    @property
    def processes(self) -> AsyncProcesses:
        """Its processes. They keep running when the client disconnects."""
        return self._client.processes(self.id)

    async def pause(self) -> Self:
        """Pause it: save memory and processes to disk, and free the host's memory."""
        return self._now(await self._client.pause(self.id))

    async def resume(self) -> Self:
        """Resume it."""
        return self._now(await self._client.resume(self.id))

    async def restart(self) -> Self:
        """Reboot it from its disk. Memory is lost."""
        return self._now(await self._client.restart(self.id))

    async def fork(self, count: int = 1, *, name: str | None = None) -> list["AsyncSandbox"]:
        """Create sandboxes from the current state of this one: files, memory and processes."""
        return await self._client.fork(self.id, count, name=name)

    async def snapshot(self, name: str | None = None) -> Snapshot:
        """Save its current state. It keeps running."""
        return await self._client.snapshot(self.id, name)

    async def roll_back(self, snapshot: str) -> Self:
        """Restore it to one of its snapshots. Its current state is lost."""
        return self._now(await self._client.roll_back(self.id, snapshot))

    async def url(self, port: int, *, cookie: bool = False, ttl: int | None = None) -> PreviewUrl:
        """Return a preview URL of one of its ports. See `AsyncSandyard.url`."""
        return await self._client.url(self.id, port, cookie=cookie, ttl=ttl)

    async def ssh(self) -> SshAccess:
        """Return how to log in to it by SSH."""
        return await self._client.ssh(self.id)

    async def cost(self) -> Cost:
        """Return what it has cost since it was created, and what it costs now."""
        return await self._client.cost(self.id)

    @property
    def network(self) -> AsyncNetwork:
        """Its network rules, and its connections."""
        return self._client.network_of(self.id)

    async def stats(self) -> Mapping[str, float]:
        """Return its current resource usage."""
        return await self._client.stats(self.id)

    async def logs(self) -> str:
        """Return the end of its console log."""
        return await self._client.logs(self.id)

    async def touch(self) -> Self:
        """Reset its idle timer."""
        return self._now(await self._client.touch(self.id))

    @listing_options
    async def change(self, **changes: Unpack[ChangeOptions]) -> Self:
        """Change a sandbox. See `ChangeOptions` for the options."""
        return self._now(await self._client.change(self.id, **changes))

    async def delete(self) -> None:
        """Delete it and wait until it is gone."""
        await self._client.delete(self.id)

    def _now(self, known: "AsyncSandbox") -> Self:
        self.raw = known.raw
        return self
