"""A house behind a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandyard.server.app.serve import http_server
from sandyard.server.app.settings import E2bSettings, HttpSettings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.fakes.driver import Conduct
from sandyard.server.front.engine import ConnectionLimits
from tests.support.house import Yard, open_yard, until
from tests.support.ports import free_port

SOON_S = 30.0
BRIEF = ConnectionLimits(head_s=0.4, still_s=0.4, look_s=0.1)


@dataclass
class Door:
    """A house behind a real socket."""

    yard: Yard
    port: int

    async def knock(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, *pieces: bytes) -> tuple[int, dict[str, object]]:
        """Send something, and return the status and the error that come back."""
        reader, writer = await self.knock()
        try:
            with suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
            async with asyncio.timeout(SOON_S):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
        finally:
            writer.close()
        return int(head.split()[1]), json.loads(body).get("error", {})

    async def is_well(self) -> bool:
        """Tell whether somebody else is served."""
        status, _ = await self.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return status == 200


@asynccontextmanager
async def door(
    home: Path,
    *,
    patience: ConnectionLimits | None = None,
    keep_alive_s: int | None = None,
    saves: bool = False,
    conduct: Conduct | None = None,
    clock: Clock | None = None,
    e2b_domain: str | None = None,
    store: Mapping[str, Any] | None = None,
    **http: object,
) -> AsyncIterator[Door]:
    port = free_port()
    settings = HttpSettings.model_validate({"port": port, **http})
    sections = {"http": settings, "e2b": E2bSettings(domain=e2b_domain), **(store or {})}
    async with open_yard(
        home, saves=saves, conduct=conduct, clock=clock, sections=sections
    ) as yard:
        front = yard.house.front
        server = http_server(front, settings, patience, is_tunnel=front.is_tunnel)
        server.config.port = port
        server.config.timeout_keep_alive = keep_alive_s or server.config.timeout_keep_alive
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve())
            await until(lambda: server.started)
            try:
                yield Door(yard, port)
            finally:
                server.should_exit = server.force_exit = True
                await serving
                for one in list(server.server_state.connections):
                    one.transport.abort()
                await until(lambda: not server.server_state.connections)
                # A command whose answer nobody waits for any more runs to its end, or to its limit.
                await until(lambda: not server.server_state.tasks, limit_s=40)
