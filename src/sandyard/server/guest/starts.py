"""Turns for starting processes: a few at a time, so that the agent stays responsive.

A start blocks the agent's thread for 20 to 100 ms in an emulated machine. Fifty at once would block
it for seconds: it would accept no connection and answer no heartbeat, and the host would consider
the machine dead.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sandyard.server.guest.system import BusyError

WAITING_MAX = 256
_AT_ONCE = 4
_HELD_S = 0.5  # a start that blocks on its directory must not keep the turn


class Starts:
    """The queue of one agent."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    @asynccontextmanager
    async def turn(self, connection: socket.socket) -> AsyncIterator[None]:
        """Hold a turn during the block, in which a process is started.

        Raises:
            BusyError: too many are waiting; nothing was started.
            ConnectionResetError: the host disconnected while this waited; nothing was started, so
                the host may tell its caller so.
        """
        if self._waiting >= WAITING_MAX:
            raise BusyError(
                f"cannot start a process now: {WAITING_MAX} are being started; none was started "
                "for this request, try again"
            )
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        release = _Once(self._turns.release)
        held = asyncio.get_running_loop().call_later(_HELD_S, release)
        try:
            await asyncio.sleep(0)  # other ready tasks run first
            if _is_gone(connection):
                raise ConnectionResetError
            yield
        finally:
            held.cancel()
            release()


class _Once:
    """Calls a function at most once."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work: Callable[[], object] | None = work

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()


def _is_gone(connection: socket.socket) -> bool:
    """Tell whether the peer has closed a connection."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
