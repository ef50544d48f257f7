"""Sockets and taps opened inside a network namespace by a process outside of it."""

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sandyard.server.core.errors import InternalError
from sandyard.server.tasks import in_thread

_T = TypeVar("_T")
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOWNER = 0x400454CA, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
_held = ctypes.PyDLL(None, use_errno=True)  # as above, without releasing the interpreter


def path_of(netns: str) -> Path:
    """Return the file of a network namespace (ip-netns(8))."""
    return Path("/run/netns") / netns


def in_namespace(netns: str, work: Callable[[], _T]) -> _T:
    """Run `work` in its own thread inside a namespace, and return its result.

    A namespace belongs to a thread. So the caller's is never changed, and the thread, which ends
    with the work, is never used again.

    Raises:
        InternalError: the namespace does not exist.
    """
    result: list[_T] = []
    trouble: list[BaseException] = []

    def body() -> None:
        try:
            descriptor = os.open(path_of(netns), os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(descriptor)
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            trouble.append(error)

    thread = threading.Thread(target=body, name=f"in-{netns}")
    thread.start()
    thread.join()
    if trouble:
        if isinstance(trouble[0], OSError):
            raise InternalError(f"cannot work in the namespace {netns}: {trouble[0]}") from trouble[
                0
            ]
        raise trouble[0]
    return result[0]


def socket_in(netns: str) -> socket.socket:
    """Return a non-blocking TCP socket in a namespace, neither bound nor connected.

    The calling thread enters the namespace for about twenty microseconds. In its own thread
    (`in_namespace`) that takes twenty times as long, and a hundred times if an event loop is busy,
    because each system call of another thread waits for the interpreter.

    Raises:
        InternalError: the namespace does not exist.
    """
    try:
        with (
            _opened("/proc/thread-self/ns/net") as own,
            _opened(path_of(netns)) as other,
        ):
            try:
                _stand_in(other)
                return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            finally:
                try:
                    _stand_in(own)
                except OSError:
                    # Otherwise the thread would continue in a guest's network.
                    os.abort()
    except OSError as error:
        raise InternalError(f"cannot work in the namespace {netns}: {error}") from error


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stand_in(descriptor: int) -> None:
    if _held.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


async def give_tap_to(netns: str, tap: str, uid: int) -> None:
    """Let an account open a tap device in a namespace.

    Raises:
        InternalError: it does not exist, or another process has it.
    """
    descriptor = await open_tap(netns, tap)
    try:
        fcntl.ioctl(descriptor, _TUNSETOWNER, uid)
    except OSError as error:
        raise InternalError(f"cannot give the tap {tap} to its account: {error}") from error
    finally:
        os.close(descriptor)


async def open_tap(netns: str, tap: str) -> int:
    """Return a descriptor of a tap device in a namespace.

    Raises:
        InternalError: it does not exist, or another process has it.
    """

    opened: list[int] = []

    def work() -> None:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", tap.encode(), flags))
        except BaseException:
            os.close(descriptor)
            raise
        opened.append(descriptor)

    try:
        await in_thread(in_namespace, netns, work)
    except BaseException:
        for descriptor in opened:
            os.close(descriptor)
        raise
    return opened[0]
