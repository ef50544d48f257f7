"""The client for asyncio: `AsyncSandbox`, and the `AsyncSandyard` that they belong to."""

import asyncio
import builtins
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, Self, Unpack, overload

from sandyard.client import calls
from sandyard.client.client import BROKEN, Told
from sandyard.client.code import AsyncContext, AsyncContexts, Shown, is_absent, name_of
from sandyard.client.connection import AsyncConnection
from sandyard.client.desktop import AsyncDesktop
from sandyard.client.errors import NotFoundError, NotReadyError, SandyardError, StillStartingError
from sandyard.client.files import AsyncFiles
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
from sandyard.client.processes import AsyncProcess, AsyncProcesses
from sandyard.client.streams import Statuses
from sandyard.client.terminals import SHELL, AsyncTerminal

_MOMENT_S = 5.0
_ENDING: set[asyncio.Task[None]] = set()
"""Tasks that clean up, held here because asyncio keeps only weak references."""


class AsyncSandyard(AsyncConnection):
    """See `Sandyard`."""

    @listing_options
    async def create(
        self,
        template: str | None = None,
        *,
        wait_s: float = 60.0,
        idempotency_key: str | None = None,
        **options: Unpack[CreateOptions],
    ) -> "AsyncSandbox":
        """See `Sandyard.create`."""
        call = calls.create(template, wait_s, idempotency_key, options)
        return AsyncSandbox(self, await self._transport.send(call), is_created=True)

    async def get(self, reference: str) -> "AsyncSandbox":
        """See `Sandyard.get`."""
        return await self._sandbox(calls.get(reference))

    @listing_options
    async def list(self, **wanted: Unpack[ListOptions]) -> AsyncIterator["AsyncSandbox"]:
        """See `Sandyard.list`."""
        query = calls.list_query(wanted)
        async for one in self._pages("/v1/sandboxes", query, calls.sandbox_of):
            yield AsyncSandbox(self, one)

    @listing_options
    async def page(
        self, cursor: str | None = None, *, limit: int = 100, **wanted: Unpack[ListOptions]
    ) -> tuple[builtins.list["AsyncSandbox"], str | None]:
        """See `Sandyard.page`."""
        query = {**calls.list_query(wanted), "limit": limit}
        call = calls.page("/v1/sandboxes", query, cursor, calls.sandbox_of)
        found, following = await self._transport.send(call)
        return [AsyncSandbox(self, one) for one in found], following

    async def delete(self, reference: str) -> None:
        """See `Sandyard.delete`."""
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
        """See `Sandyard.execute`."""
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
        """See `Sandyard.pause`."""
        await self._transport.send(calls.act(reference, "pause"))
        return await self.get(reference)

    async def resume(self, reference: str) -> "AsyncSandbox":
        """See `Sandyard.resume`."""
        await self._transport.send(calls.act(reference, "resume"))
        return await self.get(reference)

    async def restart(self, reference: str) -> "AsyncSandbox":
        """See `Sandyard.restart`."""
        await self._transport.send(calls.act(reference, "restart", safe=False))
        return await self.get(reference)

    async def logs(self, reference: str) -> str:
        """See `Sandyard.logs`."""
        return await self._transport.send(calls.logs(reference))

    async def touch(self, reference: str) -> "AsyncSandbox":
        """See `Sandyard.touch`."""
        return await self._sandbox(calls.act(reference, "touch"))

    @listing_options
    async def change(self, reference: str, **changes: Unpack[ChangeOptions]) -> "AsyncSandbox":
        """See `Sandyard.change`."""
        return await self._sandbox(calls.change(reference, changes))

    async def fork(
        self, reference: str, count: int = 1, *, name: str | None = None
    ) -> builtins.list["AsyncSandbox"]:
        """See `Sandyard.fork`."""
        made = await self._transport.send(calls.fork(reference, count, name))
        return [AsyncSandbox(self, one, is_created=True) for one in made]

    async def snapshot(self, reference: str, name: str | None = None) -> Snapshot:
        """See `Sandyard.snapshot`."""
        return await self._transport.send(calls.snapshot(reference, name))

    async def roll_back(self, reference: str, snapshot: str) -> "AsyncSandbox":
        """See `Sandyard.roll_back`."""
        return await self._sandbox(calls.roll_back(reference, snapshot))

    async def url(
        self, reference: str, port: int, *, cookie: bool = False, ttl: int | None = None
    ) -> PreviewUrl:
        """See `Sandyard.url`."""
        return await self._transport.send(calls.url(reference, port, cookie=cookie, ttl=ttl))

    async def ssh(self, reference: str) -> SshAccess:
        """See `Sandyard.ssh`."""
        return await self._transport.send(calls.ssh(reference))

    async def cost(self, reference: str) -> Cost:
        """See `Sandyard.cost`."""
        return await self._transport.send(calls.cost(reference))

    async def network(self, reference: str) -> Mapping[str, Any]:
        """See `Sandyard.network`."""
        return await self._transport.send(calls.network(reference))

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
        """See `Sandyard.set_network`."""
        rules = {
            "egress": egress, "allow": list(allow), "deny": list(deny),
            "inspect": list(inspect), "inject": [dict(one) for one in inject],
        }  # fmt: skip
        return await self._transport.send(calls.set_network(reference, rules))

    async def connections(
        self, reference: str, *, since: float | None = None
    ) -> builtins.list[Mapping[str, Any]]:
        """See `Sandyard.connections`."""
        found: builtins.list[Mapping[str, Any]] = await self._transport.send(
            calls.connections(reference, since)
        )
        return found

    async def stats(self, reference: str) -> Mapping[str, float]:
        """See `Sandyard.stats`."""
        return await self._transport.send(calls.stats(reference))

    def files(self, reference: str, *, user: str | int = "root") -> AsyncFiles:
        """See `Sandyard.files`."""
        return AsyncFiles(self._transport, calls.sandbox_path(reference), str(user))

    def desktop(self, reference: str) -> AsyncDesktop:
        """See `Sandyard.desktop`."""
        return AsyncDesktop(self._transport, calls.sandbox_path(reference))

    def processes(self, reference: str) -> AsyncProcesses:
        """See `Sandyard.processes`."""
        return AsyncProcesses(self._transport, calls.sandbox_path(reference))

    def contexts(self, reference: str) -> AsyncContexts:
        """See `Sandyard.contexts`."""
        return AsyncContexts(self._transport, calls.sandbox_path(reference))

    async def statuses(self, reference: str) -> AsyncIterator["AsyncSandbox"]:
        """See `Sandyard.statuses`."""
        async for one in self._transport.follow(Statuses(calls.sandbox_path(reference))):
            yield AsyncSandbox(self, one)

    async def _sandbox(self, call: calls.Call[calls.Raw]) -> "AsyncSandbox":
        return AsyncSandbox(self, await self._transport.send(call))


class AsyncSandbox(SandboxFacts):
    """A sandbox that can be used; see `Sandbox`::

    async with await AsyncSandbox.create() as sbx:
        print((await sbx.exec("uname -a")).stdout)
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
        self._turn = asyncio.Lock()

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
        """See `Sandbox.create`."""
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

            await _to_the_end(undo())
            raise

    @classmethod
    async def connect(
        cls, reference: str, *, client: AsyncSandyard | None = None
    ) -> "AsyncSandbox":
        """See `Sandbox.connect`."""
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
        """See `Sandbox.__exit__`."""
        await _to_the_end(self._leave(), also=NotFoundError)  # by another client, or its expiry

    async def _leave(self) -> None:
        try:
            if self._is_created:
                await self.delete()
        finally:
            await self.close()

    async def close(self) -> None:
        """See `Sandbox.close`."""
        if self._owns_client:
            await self._client.close()

    async def refresh(self) -> Self:
        """See `Sandbox.refresh`."""
        self.raw = (await self._client.get(self.id)).raw
        return self

    async def is_running(self) -> bool:
        """See `Sandbox.is_running`."""
        try:
            return (await self.refresh()).status == "running"
        except NotFoundError:
            return False

    async def set_timeout(self, seconds: int) -> Self:
        """See `Sandbox.set_timeout`."""
        return await self.change(expires_in=seconds)

    async def wait_until_ready(self, limit_s: float = 60.0) -> Self:
        """See `Sandbox.wait_until_ready`."""
        until = time.monotonic() + limit_s
        while self.status != "running":
            why = str((self.raw.get("statusReason") or {}).get("message", ""))
            said = f"the sandbox {self.id} is {self.status}{why and f': {why}'}"
            if self.status in BROKEN:
                raise NotReadyError(said)
            if time.monotonic() >= until:
                raise StillStartingError(said)
            await asyncio.sleep(0.1)
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
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
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
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
    ) -> ExecResult | AsyncProcess:
        """See `Sandbox.exec`. `on_stdout` and `on_stderr` may be coroutine functions."""
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
                for waiting in heard.told.waiting():
                    await waiting
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
        """See `Sandbox.run`."""
        options = calls.run_options(
            timeout_s,
            cwd,
            env,
            user,
            make_cwd=make_cwd,
            has_stdin=stdin is not None,
        )
        starting = asyncio.get_running_loop().create_task(self.processes.start(command, **options))
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await _to_the_end(_end_once_started(starting))
            raise
        is_over = False
        feeding: asyncio.Task[None] | None = None
        try:
            if stdin is not None:
                # Concurrently: a process whose output is not read may not read its input.
                feeding = asyncio.get_running_loop().create_task(process.pour(stdin))
            async for event in process.events():
                is_over = isinstance(event, Exited)
                yield event
        except SandyardError:
            # Paused, say, or deleted: ending the process would resume the sandbox.
            is_over = True
            raise
        finally:
            if feeding is not None:
                feeding.cancel()
            if not is_over:
                await _to_the_end(process.signal("SIGKILL", everything=True))

    async def run_code(
        self,
        code: str,
        *,
        language: str = "python",
        context: AsyncContext | str | None = None,
        timeout_s: float = 60.0,
        stdin: str = "",
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
        on_result: Shown | None = None,
    ) -> CodeResult:
        """See `Sandbox.run_code`."""
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
        """See `Sandbox.contexts`."""
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
        """See `Sandbox.open_terminal`. `on_output` may be a coroutine function."""
        process = await self.processes.start(
            command or SHELL,
            pty={"cols": columns, "rows": rows},
            cwd=cwd,
            env=dict(env or {}),
            user=user,
        )
        return AsyncTerminal(process, on_output)

    @property
    def files(self) -> AsyncFiles:
        """See `Sandbox.files`."""
        return self._client.files(self.id)

    def files_as(self, user: str | int) -> AsyncFiles:
        """See `Sandbox.files_as`."""
        return self._client.files(self.id, user=user)

    @property
    def desktop(self) -> AsyncDesktop:
        """See `Sandbox.desktop`."""
        return self._client.desktop(self.id)

    @property
    def processes(self) -> AsyncProcesses:
        """See `Sandbox.processes`."""
        return self._client.processes(self.id)

    async def pause(self) -> Self:
        """See `Sandbox.pause`."""
        return self._now(await self._client.pause(self.id))

    async def resume(self) -> Self:
        """See `Sandbox.resume`."""
        return self._now(await self._client.resume(self.id))

    async def restart(self) -> Self:
        """See `Sandbox.restart`."""
        return self._now(await self._client.restart(self.id))

    async def fork(self, count: int = 1, *, name: str | None = None) -> list["AsyncSandbox"]:
        """See `Sandbox.fork`."""
        return await self._client.fork(self.id, count, name=name)

    async def snapshot(self, name: str | None = None) -> Snapshot:
        """See `Sandbox.snapshot`."""
        return await self._client.snapshot(self.id, name)

    async def roll_back(self, snapshot: str) -> Self:
        """See `Sandbox.roll_back`."""
        return self._now(await self._client.roll_back(self.id, snapshot))

    async def url(self, port: int, *, cookie: bool = False, ttl: int | None = None) -> PreviewUrl:
        """See `Sandbox.url`."""
        return await self._client.url(self.id, port, cookie=cookie, ttl=ttl)

    async def ssh(self) -> SshAccess:
        """See `Sandbox.ssh`."""
        return await self._client.ssh(self.id)

    async def cost(self) -> Cost:
        """See `Sandbox.cost`."""
        return await self._client.cost(self.id)

    async def network(self) -> Mapping[str, Any]:
        """See `Sandbox.network`."""
        return await self._client.network(self.id)

    async def set_network(
        self,
        *,
        egress: str = "allow",
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        inspect: Sequence[str] = (),
        inject: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """See `Sandbox.set_network`."""
        return await self._client.set_network(
            self.id, egress=egress, allow=allow, deny=deny, inspect=inspect, inject=inject
        )

    async def connections(self, *, since: float | None = None) -> builtins.list[Mapping[str, Any]]:
        """See `Sandbox.connections`."""
        return await self._client.connections(self.id, since=since)

    async def stats(self) -> Mapping[str, float]:
        """See `Sandbox.stats`."""
        return await self._client.stats(self.id)

    async def logs(self) -> str:
        """See `Sandbox.logs`."""
        return await self._client.logs(self.id)

    async def touch(self) -> Self:
        """See `Sandbox.touch`."""
        return self._now(await self._client.touch(self.id))

    @listing_options
    async def change(self, **changes: Unpack[ChangeOptions]) -> Self:
        """See `Sandbox.change`."""
        return self._now(await self._client.change(self.id, **changes))

    async def delete(self) -> None:
        """See `Sandbox.delete`."""
        await self._client.delete(self.id)

    def _now(self, known: "AsyncSandbox") -> Self:
        self.raw = known.raw
        return self


async def _end_once_started(starting: "asyncio.Task[AsyncProcess]") -> None:
    await (await starting).signal("SIGKILL", everything=True)


async def _to_the_end(
    work: Coroutine[Any, Any, None], *, also: type[SandyardError] = SandyardError
) -> None:
    """Run a cleanup in its own task, even while the caller is cancelled. Errors of the server, and
    those in `also`, are suppressed.

    anyio cancels every wait in a cancelled scope, so the task is awaited for a moment, and
    continues after that.
    """
    doing = asyncio.get_running_loop().create_task(work)
    _ENDING.add(doing)
    doing.add_done_callback(_ENDING.discard)
    until: float | None = None
    while not doing.done() and (until is None or time.monotonic() < until):
        try:
            await asyncio.wait([doing], timeout=None if until is None else 0.1)
        except asyncio.CancelledError:
            until = until or time.monotonic() + _MOMENT_S
    if doing.done() and (error := doing.exception()) and not isinstance(error, also):
        raise error
    if until is not None:
        raise asyncio.CancelledError
