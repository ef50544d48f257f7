"""Runs the host's tools: as lists, with a limit, their last words in the error."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sandyard.server.core.errors import InternalError
from sandyard.server.tasks import to_the_end

_TAIL = 4000


async def run(
    command: Sequence[str | Path],
    *,
    limit_s: float,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    name: str | None = None,
) -> str:
    """Run a tool and return what it printed, standard error included, its last part if it is long.

    `on_line` is called with each line as it comes. `name` is the tool's name in errors.

    Raises:
        InternalError: the tool is missing, failed, or did not end within the limit.
    """
    name = name or str(command[0])
    try:
        process = await asyncio.create_subprocess_exec(
            *map(str, command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(env) if env is not None else None,
            limit=1024 * 1024,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise InternalError(
            f"cannot run {name}: it is not installed; `sandyard doctor` says how to get it"
        ) from error
    tail = ""
    try:
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as tasks:
            tasks.create_task(_feed(process, stdin))
            assert process.stdout is not None
            async for line in process.stdout:
                text = line.decode(errors="replace")
                tail = (tail + text)[-_TAIL:]
                if on_line is not None:
                    on_line(text.rstrip("\n"))
            code = await process.wait()
    except TimeoutError as error:
        raise InternalError(f"cannot finish {name}: no end within {limit_s:.0f} s") from error
    finally:
        if process.returncode is None:
            # With all that it started: it leads a session and a group of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await to_the_end(process.wait())
    if code != 0:
        raise InternalError(f"cannot finish {name}: it ended with {code}: {tail.strip()[-1500:]}")
    return tail


async def _feed(process: asyncio.subprocess.Process, data: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()
