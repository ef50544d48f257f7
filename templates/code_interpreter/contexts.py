"""Contexts: interpreters that run one piece of code after another, and keep their variables."""

import asyncio
import json
import os
import pwd
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from code_interpreter.items import Tell

RUN = Path("/run/code-interpreter")
STATE = Path("/run/sandyard/state")
"""The agent's record of its sandbox, with the sandbox's environment in `env`."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""It differs between sandboxes, even between those started from the same saved machine."""
GRACE_S = 5.0
"""How long code may take to end after an interruption, before its interpreter is replaced."""
START_S = 120.0
"""How long an interpreter may take to start, at the usual pace of a machine."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_RESEED = (
    "__import__('random').seed()\n"
    "'numpy' in __import__('sys').modules and __import__('numpy').random.seed()"
)


class RefusedError(Exception):
    """A request cannot be carried out. With a `status` of 400, the request is at fault."""

    def __init__(self, words: str, status: int = 500) -> None:
        super().__init__(words)
        self.status = status


@cache
def account() -> pwd.struct_passwd:
    """Return the account that code runs as."""
    return pwd.getpwnam("user")


def pace() -> float:
    """Return how many times slower than usual this machine is, as the agent has measured it."""
    try:
        told, _ = json.JSONDecoder().raw_decode(STATE.read_text())
        return min(max(float(told["pace"]), 1.0), 20.0)
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0


def sandbox_environment(known: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of the sandbox: its own, and those `known` otherwise."""
    try:
        told, _ = json.JSONDecoder().raw_decode(STATE.read_text())
        own = {str(name): str(value) for name, value in told["env"].items()}
    except (OSError, ValueError, KeyError, AttributeError):
        own = {}
    return {**known, **own}


def plain_environment() -> dict[str, str]:
    """Return the environment of a login, without the sandbox's own."""
    return {
        "PATH": os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"),
        "HOME": account().pw_dir,
        "USER": account().pw_name,
        "LOGNAME": account().pw_name,
        "SHELL": account().pw_shell,
        "LANG": "C.UTF-8",
        "VIRTUAL_ENV": "/opt/venv",
    }


def identity() -> dict[str, Any]:
    """Return the arguments of Popen with which a process is the user's."""
    if os.getuid() == account().pw_uid:
        return {}
    groups = os.getgrouplist(account().pw_name, account().pw_gid)
    return {"user": account().pw_uid, "group": account().pw_gid, "extra_groups": groups}


class Context(ABC):
    """An interpreter that runs one piece of code after another, and keeps their variables."""

    def __init__(self, language: str, cwd: str, known: Mapping[str, str]) -> None:
        """`known` are variables of the sandbox's environment, which may still change."""
        self.id = str(uuid.uuid4())
        self.language = language
        self.cwd = cwd
        self.turn = asyncio.Lock()
        self.begun = asyncio.Event()
        """Set once the piece of code that was sent last has begun, or its interpreter has ended."""
        self.known = known
        self.env: dict[str, str] = {}
        self.is_fresh = True
        self.is_removed = False
        self.needs_restart = False
        self.running: asyncio.Task[object] | None = None
        self.boot = ""
        self.interrupts_again_s: float | None = None
        """How long code that was interrupted may take to end before it is interrupted again."""

    def told(self) -> dict[str, str]:
        """Return the fields that clients see."""
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    async def start(self) -> None:
        """Start the interpreter.

        Raises:
            RefusedError: it does not start.
        """
        self.boot, self.env = BOOT_ID.read_text(), self.environment()
        self.is_fresh, self.needs_restart = True, False
        limit_s = START_S * pace()
        try:
            async with asyncio.timeout(limit_s):
                await self.launch(self.env)
        except TimeoutError as error:
            await self.end()
            raise RefusedError(
                f"cannot start {self.language} in {self.cwd}: it was not ready within {limit_s:g} s"
            ) from error
        except (OSError, RuntimeError) as error:
            await self.end()
            raise RefusedError(f"cannot start {self.language} in {self.cwd}: {error}") from error
        except BaseException:
            await self.end()
            raise

    def environment(self) -> dict[str, str]:
        """Return the environment that code is to have."""
        return plain_environment() | sandbox_environment(self.known)

    async def execute(self, code: str, variables: Mapping[str, str], tell: Tell) -> None:
        """Run a piece of code with additional environment variables, and report what it yields.

        If this is cancelled, or `tell` fails, the code is interrupted.

        Raises:
            RefusedError: the interpreter does not start, or the context was removed.
        """
        async with self.turn:
            if self.is_removed:
                raise RefusedError("the context was removed before the code's turn came")
            if self.needs_restart or not await self.is_alive():
                await self.start()
            is_over, self.running = False, asyncio.current_task()
            try:
                await self.adapt()
                await self.set_variables(dict(variables))
                self.is_fresh = False
                await self.run(code, tell)
                is_over = True
            finally:
                self.running = None
                if not is_over:
                    await self.stop()
                if await self.is_alive():
                    await self.restore(variables)

    async def restore(self, names: Iterable[str]) -> None:
        """Give environment variables the values that they have without those of a piece of code."""
        is_done = False
        try:
            async with asyncio.timeout(GRACE_S * pace()):
                await self.set_variables({name: self.env.get(name) for name in names})
                is_done = True
        except TimeoutError:
            pass
        finally:
            if not is_done:
                await self.end()

    async def adapt(self) -> None:
        """Take over what differs between sandboxes that were started from one saved machine: the
        environment, and the seeds of random numbers unless code has run, which may have set them.
        """
        boot, env = BOOT_ID.read_text(), self.environment()
        code = []
        if env != self.env:
            changed = {name for name, _ in self.env.items() ^ env.items()}
            code.append(self.setting({name: env.get(name) for name in sorted(changed)}))
        if boot != self.boot and self.is_fresh and self.language == "python":
            code.append(_RESEED)
        if code:
            await self.silently("\n".join(code))
        self.boot, self.env = boot, env

    async def set_variables(self, values: Mapping[str, str | None]) -> None:
        """Set environment variables, and remove those that have no value."""
        if values:
            await self.silently(self.setting(values))

    def setting(self, values: Mapping[str, str | None]) -> str:
        """Return the code that does what `set_variables` does."""
        valid = {name: value for name, value in values.items() if VARIABLE.fullmatch(name)}
        given = {name: value for name, value in valid.items() if value is not None}
        gone = [name for name in valid if name not in given]
        quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in given.items()}
        match self.language:
            case "python":
                return (
                    f"__import__('os').environ.update({dict(given)!r})\n"
                    f"[__import__('os').environ.pop(one, None) for one in {gone!r}]"
                )
            case "r":
                sets = [f'Sys.setenv("{name}"={value})' for name, value in quoted.items()]
                return "\n".join(sets + [f'Sys.unsetenv("{name}")' for name in gone])
            case "bash":
                sets = [f"export {name}={quote(value)}" for name, value in given.items()]
                return "\n".join(sets + [f"unset {name}" for name in gone])
            case _:
                sets = [f"process.env.{name} = {value};" for name, value in quoted.items()]
                return "\n".join(sets + [f"delete process.env.{name};" for name in gone])

    async def restart(self) -> None:
        """Replace the interpreter by a new one, before any other code runs. What it runs ends. See
        `start`."""
        self.needs_restart = True
        await self.kill()
        await self.let_go()
        async with self.turn:
            if self.needs_restart:
                await self.start()

    async def remove(self) -> None:
        """End the interpreter permanently."""
        self.is_removed = True
        await self.kill()
        await self.let_go()
        async with self.turn:
            await self.end()

    async def let_go(self) -> None:
        """Cancel code whose interpreter was killed, if its client does not read what it reports."""
        running = self.running
        if running is not None:
            await asyncio.wait({running}, timeout=GRACE_S)
            if self.running is running:
                running.cancel()

    async def stop(self) -> None:
        """Interrupt the code that runs, and end the interpreter if that is not enough."""
        settling = asyncio.ensure_future(self.settled())
        try:
            async with asyncio.timeout(GRACE_S * pace()):
                # An interpreter that is idle ignores an interruption.
                await self.begun.wait()
                while not settling.done():
                    await self.interrupt()
                    await asyncio.wait({settling}, timeout=self.interrupts_again_s)
                await settling
                return
        except (TimeoutError, ProcessLookupError):
            pass
        finally:
            settling.cancel()
        await self.end()

    @abstractmethod
    async def launch(self, env: Mapping[str, str]) -> None:
        """Start the process, and wait until it takes code."""

    @abstractmethod
    async def is_alive(self) -> bool:
        """Tell whether the interpreter runs."""

    @abstractmethod
    async def run(self, code: str, tell: Tell) -> None:
        """Run a piece of code to completion, or until the interpreter exits."""

    @abstractmethod
    async def silently(self, code: str) -> None:
        """Run code of the server's own, and report nothing."""

    @abstractmethod
    async def interrupt(self) -> None:
        """Interrupt the code that runs."""

    @abstractmethod
    async def kill(self) -> None:
        """Kill the interpreter. Code that runs in it then fails."""

    @abstractmethod
    async def settled(self) -> None:
        """Wait until the code that was interrupted has ended."""

    @abstractmethod
    async def end(self) -> None:
        """End the interpreter and release its resources. No code may run in it."""


def quote(value: str) -> str:
    """Return a word of a shell."""
    return "'" + value.replace("'", "'\\''") + "'"
