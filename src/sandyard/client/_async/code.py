"""Contexts: interpreters in a sandbox, which keep what earlier code defined."""

import builtins
from collections.abc import Mapping
from typing import Any

from sandyard.client import calls, contexts
from sandyard.client._async.concurrency import call_back
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.contexts import OnText, Shown
from sandyard.client.errors import ConnectionFailedError
from sandyard.client.models import CodeResult, RemotePath


class AsyncContext:
    """An interpreter in a sandbox. `id` identifies it to any client."""

    def __init__(self, transport: AsyncTransport, path: str, raw: Mapping[str, Any]) -> None:
        self._transport = transport
        self._path = calls.part_of(path, raw["id"])
        self.raw = raw

    @property
    def id(self) -> str:
        """Its id."""
        return str(self.raw["id"])

    @property
    def language(self) -> str:
        """`python`, `node` or `bash`."""
        return str(self.raw["language"])

    async def run(
        self,
        code: str,
        *,
        timeout_s: float = 60.0,
        stdin: str = "",
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_result: Shown | None = None,
    ) -> CodeResult:
        """Run code and return its output, results and exception. Of several pieces of code, one
        runs at a time.

        `stdin` is what `input()` reads. The callbacks receive output and results as they come.
        Callbacks may be coroutine functions. After `timeout_s` the code is interrupted, and what
        it defined stays; code that goes on nevertheless is ended with its interpreter.
        """
        running = contexts.Running(on_stdout, on_stderr, on_result)
        call = contexts.run(self._path, code, timeout_s, stdin)
        async with self._transport.stream(call) as answer:
            async for line in answer.aiter_lines():
                running.feed(line)
                await call_back(running.callbacks)
                if running.is_over:
                    return running.result()
        raise ConnectionFailedError("the server broke off before the end of the code")

    async def restart(self) -> None:
        """Replace the interpreter by a new one, and end everything that its code has started."""
        await self._transport.send(contexts.act(self._path, "restart"))

    async def interrupt(self) -> None:
        """Interrupt the code that it runs, as Ctrl-C does."""
        await self._transport.send(contexts.act(self._path, "interrupt"))

    async def delete(self) -> None:
        """End it, and everything that its code has started."""
        await self._transport.send(contexts.delete(self._path))


class AsyncContexts:
    """The contexts of one sandbox."""

    def __init__(self, transport: AsyncTransport, sandbox_path: str) -> None:
        self._transport = transport
        self._path = f"{sandbox_path}/contexts"

    async def create(
        self, language: str = "python", *, cwd: RemotePath = "/workspace", user: str = "root"
    ) -> AsyncContext:
        """Start an interpreter: `python`, `node` or `bash`."""
        return self._context(
            await self._transport.send(contexts.create(self._path, language, cwd, user))
        )

    async def get(self, context_id: str) -> AsyncContext:
        """Return a context by its id."""
        return self._context(await self._transport.send(contexts.get(self._path, context_id)))

    async def list(self) -> builtins.list[AsyncContext]:
        """Return the contexts, whichever client created them, oldest first."""
        return [
            self._context(one) for one in await self._transport.send(contexts.listing(self._path))
        ]

    def _context(self, raw: Mapping[str, Any]) -> AsyncContext:
        return AsyncContext(self._transport, self._path, raw)
