"""What several servers do about workspaces: one at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from tests.support.clock import DrivenClock
from tests.support.desk import Desk, open_desk, still

from sandyard.server.core.errors import UnavailableError

_BLOCK = 4096


async def two_desks(home: Path, held: AsyncExitStack) -> list[Desk]:
    """Open two servers of one installation."""
    clock = DrivenClock()
    return [
        await held.enter_async_context(open_desk(home, clock=clock, server_id=name))
        for name in ("one", "two")
    ]


@asynccontextmanager
async def looking_around(desk: Desk) -> AsyncIterator[asyncio.Task[None]]:
    """Have a server look after workspaces."""
    task = asyncio.create_task(desk.services.workspaces.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_workspaces_are_measured_by_one_server_and_by_its_peer_when_it_is_gone(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as held:
        one, two = await two_desks(tmp_path, held)
        made = (await one.services.workspaces.create(one.actor, "Work")).workspace
        file = tmp_path / "workspaces" / made.id / "file"

        async def measured(blocks: int) -> int:
            """Write a file, let one look pass, and return the blocks that were measured."""
            workspaces = one.services.workspaces
            found = (await workspaces.get(one.actor, made.id)).workspace
            await workspaces.note_use(found, has_changed=False)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(blocks * _BLOCK))
            await one.drive(60, step=10)
            found = (await workspaces.get(one.actor, made.id)).workspace
            return found.size_bytes // _BLOCK - 1  # the folder takes one

        first = await held.enter_async_context(looking_around(one))
        await still()
        await held.enter_async_context(looking_around(two))
        assert await measured(10) == 10
        first.cancel()
        assert await measured(20) == 10  # the duty of the first one lasts
        await one.drive(60, step=10)
        assert await measured(30) == 30


async def test_a_server_that_fails_throughout_leaves_workspaces_to_its_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as held:
        one, two = await two_desks(tmp_path, held)
        made = (await one.services.workspaces.create(one.actor, "Work")).workspace
        await one.services.workspaces.note_use(made, has_changed=False)
        file = tmp_path / "workspaces" / made.id / "file"
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(_BLOCK))

        async def fails(*_: object) -> None:
            raise UnavailableError("the folder is not there")

        monkeypatch.setattr(one.services.workspaces._volumes, "use_of", fails)
        await held.enter_async_context(looking_around(one))
        await still()
        await held.enter_async_context(looking_around(two))
        await one.drive(180, step=10)
        found = (await two.services.workspaces.get(two.actor, made.id)).workspace
        assert found.size_bytes == 2 * _BLOCK
