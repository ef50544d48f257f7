"""Programs that a driver runs to their end, and files that a hypervisor wrote."""

import asyncio
import contextlib
import logging
import os
import signal
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from sandyard.server.core.errors import InternalError
from sandyard.server.tasks import to_the_end

log = logging.getLogger(__name__)

_OUTPUT_MAX = 1000
_KILL_LIMIT_S = 10.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


async def output_of(
    arguments: Sequence[str],
    *,
    limit_s: float,
    pass_fds: Collection[int] = (),
    to: int | None = None,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program and return all it printed; what is printed goes to a descriptor `to` if given.

    It runs in its own session, so that its background processes are not ours. Its environment is
    `env` and what every program needs.

    Raises:
        ChildProcessError: it failed; the message is the end of what it printed.
        TimeoutError: it did not end in time and was killed, with its process group.
        OSError: it cannot be run.
    """
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE if to is None else to,
        stderr=asyncio.subprocess.STDOUT if to is None else to,
        # Nothing of this process's environment: a guest may take over what is started.
        env={"PATH": _PATH, "LC_ALL": "C.UTF-8", **(env or {})},
        pass_fds=pass_fds,
        start_new_session=True,
    )
    has_ended = False
    try:
        async with asyncio.timeout(limit_s):
            output, _ = await process.communicate()
        has_ended = True
    finally:
        if not has_ended:
            # Its whole group: what it has started may hold its output open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await to_the_end(_gone(process, arguments[0]))
    output = output or b""
    if process.returncode != 0:
        raise ChildProcessError(output.decode(errors="replace").strip()[-_OUTPUT_MAX:])
    return output


async def _gone(process: asyncio.subprocess.Process, name: str) -> None:
    """Wait for a process that was killed; one that is stuck in the kernel is left to it."""
    try:
        async with asyncio.timeout(_KILL_LIMIT_S):
            await process.wait()
    except TimeoutError:
        log.error("%s did not end when it was killed", name)


@contextlib.contextmanager
def opened_as_written_by(uid: int, path: Path) -> Iterator[int]:
    """Open a file to read that an account wrote which is not trusted.

    Raises:
        InternalError: it is no plain file of that account's alone.
        OSError: it cannot be opened.
    """
    # Non-blocking, because a pipe in its place would block forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        is_plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if not is_plain or found.st_uid != uid:
            raise InternalError(f"cannot save the machine: {path.name} is no file of its own")
        yield descriptor
    finally:
        os.close(descriptor)
