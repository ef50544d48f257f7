"""Contexts in the interpreters of the `/v1` API: JavaScript, TypeScript and Bash.

The sources of these interpreters say what they read and report.
"""

import asyncio
import base64
import codecs
import contextlib
import json
import os
import secrets
import signal
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from code_interpreter.contexts import Context, identity
from code_interpreter.items import ENDED, Item, Tell, error_of, ignore, result_of

FOLDER = Path(__file__).parent
"""Where the template has the interpreters' sources."""
_NODE = ("node", "--expose-internals", "--no-warnings", "-e")
_OUTPUTS = ("stdout", "stderr")
_LOOK_S = 1.0
"""How often a silent interpreter is checked for having ended."""
_READ_SIZE = 65536
_REPORT_MAX = 32 * 1024 * 1024
"""Bytes of one report."""
_WAITING_MAX = 16
"""Pieces of output that wait to be reported."""


def command_of(language: str) -> tuple[str, ...]:
    """Return the command of a language's interpreter."""
    if language == "bash":
        return ("bash", "-c", (FOLDER / "interpreter.sh").read_text())
    return (*_NODE, (FOLDER / "interpreter.js").read_text())


class ScriptContext(Context):
    """A context in one of the interpreters of the `/v1` API."""

    def __init__(
        self, language: str, cwd: str, known: Mapping[str, str], command: tuple[str, ...]
    ) -> None:
        super().__init__(language, cwd, known)
        self.command = command
        if language == "bash":
            # A shell can lose a signal that arrives while it starts a program.
            self.interrupts_again_s = 0.5
        self.process: asyncio.subprocess.Process | None = None
        self.held = contextlib.AsyncExitStack()
        self.heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(_WAITING_MAX)
        self.closed: set[str] = set()
        self.reports: Reports | None = None
        self.count = 0

    async def launch(self, env: Mapping[str, str]) -> None:
        await self.end()
        self.heard, self.closed, self.count = asyncio.Queue(_WAITING_MAX), set(), 0
        outputs = {name: os.pipe() for name in _OUTPUTS}
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self.command, stdin=asyncio.subprocess.PIPE, cwd=self.cwd, env=env,
                stdout=outputs["stdout"][1], stderr=outputs["stderr"][1],
                start_new_session=True, **identity(),
            )  # fmt: skip
        finally:
            pipes = {name: os.fdopen(read, "rb", 0) for name, (read, _) in outputs.items()}
            for _, write in outputs.values():
                os.close(write)
            for pipe in pipes.values():
                self.held.callback(pipe.close)
        for name, pipe in pipes.items():
            await self._listen(name, pipe)
        await self.silently("")
        if not await self.is_alive():
            raise RuntimeError("the interpreter ended at once")

    async def _listen(self, name: str, pipe: BinaryIO) -> None:
        """Read one output until `end`. Processes that the code has started may keep it open for
        longer than the interpreter runs, so the pipes are not the process's in asyncio's eyes."""
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), pipe
        )
        self.held.callback(transport.close)
        reader = asyncio.create_task(self.read(name, stream))
        self.held.callback(reader.cancel)

    async def read(self, name: str, stream: asyncio.StreamReader) -> None:
        """Read one output. Between pieces of code nothing is kept."""
        while data := await stream.read(_READ_SIZE):
            if self.reports is not None:
                await self.heard.put((name, data))
        self.closed.add(name)
        await self.heard.put((name, b""))

    async def is_alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def run(self, code: str, tell: Tell) -> None:
        if not await self.is_alive():
            await tell(ENDED)
            return
        self.count += 1
        await tell({"type": "number_of_executions", "execution_count": self.count})
        await self.ask(code)
        await self.follow(tell)

    async def silently(self, code: str) -> None:
        await self.ask(code)
        await self.follow(ignore)

    async def settled(self) -> None:
        await self.follow(ignore)

    async def ask(self, code: str) -> None:
        """Send a piece of code, if the interpreter runs."""
        if self.process is None or self.process.stdin is None:
            return
        mark = secrets.token_hex(16)
        self.begun.clear()
        self.reports = Reports(mark)
        if self.language == "bash":
            asked = f"\n{mark} {base64.b64encode(code.encode()).decode()} \n"
        else:
            is_typed = self.language == "typescript"
            asked = f"\n{json.dumps({'mark': mark, 'code': code, 'types': is_typed})}\n"
        with contextlib.suppress(ConnectionError):  # it has ended, which its outputs show
            self.process.stdin.write(asked.encode())
            await self.process.stdin.drain()

    async def follow(self, tell: Tell) -> None:
        """Tell what the code reports, until it or the interpreter has ended."""
        now, has_ended, ends = asyncio.get_running_loop().time, False, None
        while self.reports is not None and not self.reports.is_over and not has_ended:
            if ends is None and not await self.is_alive():
                ends = now() + _LOOK_S  # time to read what it printed; others may print forever
            try:
                async with asyncio.timeout(_LOOK_S):
                    name, data = await self.heard.get()
            except TimeoutError:
                # Without both outputs it cannot report its end.
                has_ended = bool(self.closed) or not await self.is_alive()
                continue
            is_silent = len(self.closed) == len(_OUTPUTS) and self.heard.empty()
            has_ended = is_silent or (ends is not None and now() > ends)
            for item in self.reports.feed(name, data):
                await tell(item)
            if self.reports.begun:
                self.begun.set()
        self.reports = None
        self.begun.set()
        while not self.heard.empty():  # so that no reader waits until the next piece
            self.heard.get_nowait()
        if has_ended:
            await self.end()
            await tell(ENDED)

    async def interrupt(self) -> None:
        if self.process is not None and self.process.returncode is None:
            # A shell waits for the program that it runs.
            group = self.language == "bash"
            (os.killpg if group else os.kill)(self.process.pid, signal.SIGINT)

    async def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def end(self) -> None:
        await self.kill()
        process, self.process, self.reports = self.process, None, None
        await self.held.aclose()
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()


class Reports:
    """Reads the reports about one piece of code, which has a `mark`, out of both outputs."""

    def __init__(self, mark: str) -> None:
        self.head = b"\0" + mark.encode()
        self.left = {name: bytearray() for name in _OUTPUTS}
        self.searched = dict.fromkeys(_OUTPUTS, 0)
        """How far a report that has begun was searched for its end."""
        self.texts = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in _OUTPUTS}
        self.begun: set[str] = set()
        self.ended: set[str] = set()

    @property
    def is_over(self) -> bool:
        """Whether the code has ended, and all that it printed was read."""
        return len(self.ended) == len(_OUTPUTS)

    def feed(self, name: str, data: bytes) -> list[Item]:
        """Take output, and return what it reports."""
        found: list[Item] = []
        left = self.left[name]
        left += data
        while name not in self.ended:
            at = 0 if self.searched[name] else left.find(self.head)
            sure = at if at >= 0 else _sure(left, self.head)
            text = self.texts[name].decode(bytes(left[:sure]))
            del left[:sure]
            if text and name in self.begun:
                now = datetime.now(UTC).isoformat()
                found.append({"type": name, "text": text, "timestamp": now})
            if at < 0:
                break
            end = left.find(b"\0", max(self.searched[name], len(self.head)))
            if end < 0 and len(left) < _REPORT_MAX:
                self.searched[name] = len(left)
                break
            said = bytes(left[len(self.head) : end]) if end >= 0 else b""
            del left[: end + 1 if end >= 0 else len(left)]
            self.searched[name] = 0
            found += self.report(name, said[:1], said[1:])
        return found

    def report(self, name: str, kind: bytes, body: bytes) -> list[Item]:
        """Take one report, and return what clients are to know of it. Code can print reports of its
        own, so any may be damaged."""
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        told = told if isinstance(told, dict) else {}
        match kind:
            case b"B":
                self.begun.add(name)
            case b"R" if "text" in told:
                return [result_of({"text/plain": told["text"]}, is_main=told.get("isMain") is True)]
            case b"E":
                self.ended.add(name)
                if isinstance(error := told.get("error"), dict):
                    words = (str(error.get(one, "")) for one in ("name", "value", "traceback"))
                    return [error_of(*words)]
            case _:
                pass
        return []


def _sure(left: bytearray, head: bytes) -> int:
    """Return how many bytes are not the beginning of a report."""
    at = left.rfind(b"\0")
    return at if at >= 0 and head.startswith(left[at:]) else len(left)
