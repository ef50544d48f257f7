"""Contexts: interpreters in a sandbox, which keep what earlier code defined."""

import base64
import binascii
import builtins
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from sandyard.client import calls
from sandyard.client.errors import ConnectionFailedError, NotFoundError
from sandyard.client.models import CodeError, CodeResult, RemotePath, Result
from sandyard.client.streams import EVENTS_S, Followed
from sandyard.client.transport import AsyncTransport, Transport

Told = Callable[[str], object]
Shown = Callable[[Result], object]
_NAMES = {"javascript": "node", "js": "node", "sh": "bash", "py": "python"}
_PICTURES = ("png", "jpeg", "pdf")


class Context:
    """An interpreter in a sandbox. `id` identifies it to any client."""

    def __init__(self, transport: Transport, path: str, raw: Mapping[str, Any]) -> None:
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

    def run(
        self,
        code: str,
        *,
        timeout_s: float = 60.0,
        stdin: str = "",
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
        on_result: Shown | None = None,
    ) -> CodeResult:
        """Run code and return its output, results and exception. Of several pieces of code, one
        runs at a time.

        `stdin` is what `input()` reads. The callbacks receive output and results as they come.
        After `timeout_s` the code is interrupted, and what it defined stays; code that goes on
        nevertheless is ended with its interpreter.
        """
        run = _Run(on_stdout, on_stderr, on_result)
        call = _run(self._path, code, timeout_s, stdin)
        with self._transport.stream(call) as answer:
            for line in answer.iter_lines():
                run.feed(line)
                run.told.call()
                if run.is_over:
                    return run.result()
        raise ConnectionFailedError("the server broke off before the end of the code")

    def restart(self) -> None:
        """Replace the interpreter by a new one, and end everything that its code has started."""
        self._transport.send(_act(self._path, "restart"))

    def interrupt(self) -> None:
        """Interrupt the code that it runs, as Ctrl-C does."""
        self._transport.send(_act(self._path, "interrupt"))

    def delete(self) -> None:
        """End it, and everything that its code has started."""
        self._transport.send(_delete(self._path))


class Contexts:
    """The contexts of one sandbox."""

    def __init__(self, transport: Transport, sandbox_path: str) -> None:
        self._transport = transport
        self._path = f"{sandbox_path}/contexts"

    def create(
        self, language: str = "python", *, cwd: RemotePath = "/workspace", user: str = "root"
    ) -> Context:
        """Start an interpreter: `python`, `node` or `bash`."""
        return self._context(self._transport.send(_create(self._path, language, cwd, user)))

    def get(self, context_id: str) -> Context:
        """Return a context by its id."""
        return self._context(self._transport.send(_get(self._path, context_id)))

    def list(self) -> builtins.list[Context]:
        """Return the contexts, whichever client created them, oldest first."""
        return [self._context(one) for one in self._transport.send(_list(self._path))]

    def _context(self, raw: Mapping[str, Any]) -> Context:
        return Context(self._transport, self._path, raw)


class AsyncContext:
    """See `Context`."""

    def __init__(self, transport: AsyncTransport, path: str, raw: Mapping[str, Any]) -> None:
        self._transport = transport
        self._path = calls.part_of(path, raw["id"])
        self.raw = raw

    @property
    def id(self) -> str:
        """See `Context.id`."""
        return str(self.raw["id"])

    @property
    def language(self) -> str:
        """See `Context.language`."""
        return str(self.raw["language"])

    async def run(
        self,
        code: str,
        *,
        timeout_s: float = 60.0,
        stdin: str = "",
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
        on_result: Shown | None = None,
    ) -> CodeResult:
        """See `Context.run`. The callbacks may be coroutine functions."""
        run = _Run(on_stdout, on_stderr, on_result)
        call = _run(self._path, code, timeout_s, stdin)
        async with self._transport.stream(call) as answer:
            async for line in answer.aiter_lines():
                run.feed(line)
                for waiting in run.told.waiting():
                    await waiting
                if run.is_over:
                    return run.result()
        raise ConnectionFailedError("the server broke off before the end of the code")

    async def restart(self) -> None:
        """See `Context.restart`."""
        await self._transport.send(_act(self._path, "restart"))

    async def interrupt(self) -> None:
        """See `Context.interrupt`."""
        await self._transport.send(_act(self._path, "interrupt"))

    async def delete(self) -> None:
        """See `Context.delete`."""
        await self._transport.send(_delete(self._path))


class AsyncContexts:
    """See `Contexts`."""

    def __init__(self, transport: AsyncTransport, sandbox_path: str) -> None:
        self._transport = transport
        self._path = f"{sandbox_path}/contexts"

    async def create(
        self, language: str = "python", *, cwd: RemotePath = "/workspace", user: str = "root"
    ) -> AsyncContext:
        """See `Contexts.create`."""
        return self._context(await self._transport.send(_create(self._path, language, cwd, user)))

    async def get(self, context_id: str) -> AsyncContext:
        """See `Contexts.get`."""
        return self._context(await self._transport.send(_get(self._path, context_id)))

    async def list(self) -> builtins.list[AsyncContext]:
        """See `Contexts.list`."""
        return [self._context(one) for one in await self._transport.send(_list(self._path))]

    def _context(self, raw: Mapping[str, Any]) -> AsyncContext:
        return AsyncContext(self._transport, self._path, raw)


def name_of(language: str) -> str:
    """Return a language by its usual names as the server knows it."""
    return _NAMES.get(language.lower(), language)


def is_absent(error: NotFoundError) -> bool:
    """Tell whether an error means that a context is gone, and not its sandbox."""
    return error.details.get("reason") == "no_context"


class _Run(Followed[None]):
    """What a piece of code reports, collected."""

    def __init__(
        self, on_stdout: Told | None, on_stderr: Told | None, on_result: Shown | None
    ) -> None:
        super().__init__("", {})
        self.told = calls.Callbacks()
        self._on_text = {"stdout": on_stdout, "stderr": on_stderr}
        self._on_result = on_result
        self._said: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._room = dict.fromkeys(self._said, calls.SAID_MAX)
        self._results: list[Result] = []
        self._error: CodeError | None = None
        self._is_cut = False

    def _is_refusal(self, name: str, data: Any) -> bool:
        return name == "error" and "name" not in data  # which an error of the code has

    def _event(self, name: str, data: Any, number: str | None) -> None:
        match name:
            case "stdout" | "stderr":
                text = str(data["text"])
                self._is_cut = self._is_cut or len(text) > self._room[name]
                self._said[name].append(text[: self._room[name]])
                self._room[name] -= min(len(text), self._room[name])
                self.told.tell(self._on_text[name], text)
            case "result":
                result = _result_of(data)
                self._is_cut = self._is_cut or result.truncated
                self._results.append(result)
                self.told.tell(self._on_result, result)
            case "error":
                self._error = CodeError(
                    str(data["name"]), str(data["value"]), str(data["traceback"])
                )
            case "end":
                self.is_over = True
            case _:
                pass  # of a later version

    def result(self) -> CodeResult:
        """Return all of it."""
        main = [one.text for one in self._results if one.is_main]
        return CodeResult(
            "".join(self._said["stdout"]),
            "".join(self._said["stderr"]),
            main[-1] if main else None,
            self._error,
            truncated=self._is_cut,
            results=tuple(self._results),
        )


def _result_of(data: Mapping[str, Any]) -> Result:
    forms = {name: one for name, one in data.items() if name not in ("isMain", "truncated")}
    for name in _PICTURES:
        if name in forms:
            with suppress(binascii.Error, ValueError):
                forms[name] = base64.b64decode(forms[name])
    return Result(
        text=str(forms.pop("text", "")),
        forms=forms,
        is_main=data.get("isMain") is True,
        truncated=data.get("truncated") is True,
    )


def _create(path: str, language: str, cwd: RemotePath, user: str) -> calls.Call[Any]:
    body = {"language": name_of(language), "cwd": str(cwd), "user": user}
    return calls.Call("POST", path, _data, body=body, headers=calls.keyed(None), safe=True)


def _get(path: str, context_id: str) -> calls.Call[Any]:
    return calls.Call("GET", calls.part_of(path, context_id), _data, safe=True)


def _list(path: str) -> calls.Call[list[Any]]:
    return calls.Call("GET", path, lambda a: list(a["data"]), safe=True)


def _act(path: str, action: str) -> calls.Call[Any]:
    return calls.Call("POST", f"{path}/{action}", _data)


def _delete(path: str) -> calls.Call[Any]:
    return calls.Call("DELETE", path, _data)


def _run(path: str, code: str, timeout_s: float, stdin: str) -> calls.Call[Any]:
    body = {"code": code, "timeout": calls.milliseconds(timeout_s), "stdin": stdin}
    return calls.Call("POST", f"{path}/run", _data, body=body, limit_s=EVENTS_S)


def _data(answer: Any) -> Any:
    return answer["data"]
