"""MOUNT, UNMOUNT: workspaces in the user's file system.

A child makes the calls: if a server does not answer, only the child blocks, and it can be killed.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import signal
import struct
from collections.abc import Callable
from pathlib import Path

from sandyard.server.core import ops
from sandyard.server.guest import processes, system
from sandyard.server.guest.context import Context
from sandyard.server.guest.system import RefusedError

_GATEWAY = "172.16.0.1"
_GUEST = "172.16.0.2"
_LIMIT_S = 30.0
_LOADING = "/usr/lib/sandyard/load-modules"
_CLIENT = Path("/sys/module/nfs/parameters/nfs4_unique_id")
_SHARES = Path("/sys/fs/nfs")
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8  # umount(2)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4  # mount(2)
_MS_NOATIME = 1024
# A missing name is never cached, so a file that was just uploaded can be opened.
_OPTIONS = "proto=tcp,hard,timeo=50,retrans=2,sec=sys,lookupcache=positive"
_VERSIONS = ("4.2", "4.1")  # older servers support only the older one
_ROOM = 500  # of a message, in a pipe
_FINE, _HEAD = b"fine", 4
_LOOK_S = 0.02
_libc = ctypes.CDLL(None, use_errno=True)


async def mount(context: Context, wish: ops.MountAll | ops.Unmount) -> None:
    """See core.ops.MountAll and core.ops.Unmount.

    Raises:
        RefusedError: one of them cannot be mounted, or would not go.
    """
    if isinstance(wish, ops.Unmount):
        await _leave_at(context, os.fsencode(wish.path))
        return
    if not _CLIENT.exists():
        await _load_module()
    try:
        _CLIENT.write_text(wish.client)
    except OSError as error:
        raise RefusedError(
            "cannot mount workspaces: the kernel of this machine has no NFS client"
        ) from error
    await _by_child(context, lambda: _mount_all(wish))


async def leave_mounts(context: Context) -> None:
    """Unmount everything remote; programs that use it get errors.

    Raises:
        RefusedError: that failed.
    """
    await _leave_at(context, None)


async def _leave_at(context: Context, path: bytes | None) -> None:
    """Unmount what is mounted at a path, or everything for None."""

    def found() -> dict[bytes, str]:
        return {one: share for one, share in _mounted() if path in (None, one)}

    if here := found():
        await _by_child(context, lambda: _leave(here), is_done=lambda: not found())


def _mounted() -> list[tuple[bytes, str]]:
    """Return the paths of remote mounts, outer ones first, and the kernel's number for each
    share."""
    found = []
    for line in Path("/proc/1/mountinfo").read_bytes().splitlines():
        words = line.split(b" ")
        if words[words.index(b"-") + 1] == b"nfs4":
            path = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), words[4])
            found.append((path, words[2].decode()))
    return sorted(found, key=lambda one: len(one[0]))


async def _load_module() -> None:
    process = await asyncio.create_subprocess_exec(
        _LOADING, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_LIMIT_S):
            await process.wait()
    except TimeoutError as error:
        process.kill()
        raise RefusedError("cannot mount workspaces: the NFS client does not load") from error


async def _by_child(
    context: Context, work: Callable[[], None], *, is_done: Callable[[], bool] = lambda: False
) -> None:
    """Let a child do the work in the user's root, and return once it has ended, or `is_done` says
    so.

    The agent does not wait for the child's own end, which may take as long as the kernel needs.

    Raises:
        RefusedError: it failed, and why; or it took too long and was killed.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def body() -> None:
        if os.fork():
            os._exit(0)
        os.write(writing, struct.pack("=I", os.getpid()))
        try:
            system.enter(context.root_fd)
            work()
            os.write(writing, _FINE)
        except (OSError, RefusedError) as error:
            os.write(writing, str(error).encode()[:_ROOM])

    try:
        os.waitpid(processes.fork(body), 0)
    finally:
        os.close(writing)
    output = bytearray()
    try:
        async with asyncio.timeout(_LIMIT_S):
            while not is_done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await processes.readable(reading)
                with contextlib.suppress(BlockingIOError):
                    if not (more := os.read(reading, _ROOM)):
                        break
                    output += more
                    if output[_HEAD:] == _FINE:  # its end may take as long as it likes
                        break
            else:
                return
    except BaseException as error:
        if len(output) >= _HEAD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(struct.unpack_from("=I", output)[0], signal.SIGKILL)
        if isinstance(error, TimeoutError):
            raise RefusedError("cannot mount workspaces: their server does not answer") from error
        raise
    finally:
        os.close(reading)
    if (problem := bytes(output[_HEAD:])) != _FINE:
        why = problem.decode(errors="replace") or "it was broken off"
        raise RefusedError(f"cannot mount workspaces: {why}")


def _mount_all(wish: ops.MountAll) -> None:
    os.umask(0o022)
    for one in wish.mounts:
        try:
            os.makedirs(one.path, exist_ok=True)
            _mount_one(one, port=wish.port, cache_s=wish.attribute_cache_s)
        except OSError as error:
            raise RefusedError(f"{one.path}: {error.strerror}") from error


def _mount_one(wish: ops.MountPoint, *, port: int, cache_s: int) -> None:
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOATIME | (_MS_RDONLY if wish.read_only else 0)
    source, number = f"{_GATEWAY}:/{wish.name}".encode(), 0
    for version in _VERSIONS:
        # By default attributes are not cached: changes by others are visible at once.
        options = (
            f"vers={version},{_OPTIONS},actimeo={cache_s},addr={_GATEWAY},clientaddr={_GUEST},"
            f"port={port}"
        )
        if _libc.mount(source, wish.path.encode(), b"nfs4", flags, options.encode()) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EPROTONOSUPPORT:
            break
    raise OSError(number, os.strerror(number))


def _leave(found: dict[bytes, str]) -> None:
    """Unmount shares, and make the kernel send nothing more to their server."""
    for share in set(found.values()):
        with contextlib.suppress(OSError):  # older kernels have no such switch
            (_SHARES / share / "shutdown").write_text("1")
    gone: list[bytes] = []
    for path in found:
        # Mounts below another are unmounted with it, and looking for them would ask the server.
        if any(path.startswith(outer + b"/") for outer in gone):
            continue
        flags = _MNT_FORCE | _MNT_DETACH | _UMOUNT_NOFOLLOW
        if _libc.umount2(path, flags) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), os.fsdecode(path))
        gone.append(path)
