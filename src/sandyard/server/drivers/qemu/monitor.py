"""A typed door to QEMU's monitor protocol (QMP); the library behind it has no types."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qemu.qmp import EventListener, QMPClient, QMPError

from sandyard.server.core.errors import UnavailableError

_LIMIT_S = 10.0
_REFUSED_S = 2.0
_AGAIN_S = 0.005
_ENDING_EVENTS = ("SHUTDOWN", "GUEST_PANICKED")


class Monitor:
    """One connection to one QEMU. Every call has a limit."""

    def __init__(self, client: QMPClient, ending: EventListener) -> None:
        self._client = client
        self._ending = ending

    @classmethod
    async def connect(cls, socket: Path) -> "Monitor":
        """Connect to the monitor behind a socket.

        Raises:
            UnavailableError: nobody answers there.
        """
        until = asyncio.get_running_loop().time() + _REFUSED_S
        while True:
            client = QMPClient(socket.parent.name)
            client.logger.setLevel("CRITICAL")
            ending = EventListener(names=_ENDING_EVENTS)
            client.register_listener(ending)
            try:
                async with asyncio.timeout(_LIMIT_S):
                    await client.connect(str(socket))
            except (QMPError, OSError, TimeoutError) as error:
                # QEMU makes the socket a moment before it listens there.
                is_early = isinstance(error.__cause__, ConnectionRefusedError)
                if not is_early or asyncio.get_running_loop().time() > until:
                    raise UnavailableError(
                        f"cannot reach the monitor {socket}: {error!r}"
                    ) from error
                await asyncio.sleep(_AGAIN_S)
            else:
                return cls(client, ending)

    async def call(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Carry out one command and return what it returned.

        Raises:
            UnavailableError: QEMU refused, is gone, or did not answer in time.
        """
        try:
            async with asyncio.timeout(_LIMIT_S):
                result: object = await self._client.execute(command, dict(arguments or {}))
        except (QMPError, OSError, TimeoutError) as error:
            raise UnavailableError(f"cannot carry out {command} in QEMU: {error!r}") from error
        return result

    async def status(self) -> str:
        """Return the machine's run state, such as `running`, `shutdown` or `io-error`."""
        result = await self.call("query-status")
        return str(result.get("status")) if isinstance(result, dict) else ""

    async def migration(self) -> str:
        """Return how far the loading of a saved state is: `completed`, `failed`, or under way."""
        result = await self.call("query-migrate")
        return str(result.get("status")) if isinstance(result, dict) else ""

    async def ending(self) -> str:
        """Return the name of the event that says the guest has come to its end."""
        event = await self._ending.get()
        return str(event.get("event"))

    async def close(self) -> None:
        """Close the connection; QEMU lives on."""
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_LIMIT_S):
                await self._client.disconnect()
