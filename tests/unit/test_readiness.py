"""Whether a server can serve is known at once, however its database fails."""

import asyncio
from typing import Any

import pytest
from tests.support.clock import DrivenClock

from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.service.readiness import Readiness


class Database:
    """What a test sets: whether it answers, refuses, or says nothing."""

    def __init__(self) -> None:
        self.state = "answers"

    async def ping(self) -> None:
        if self.state == "refuses":
            raise UnavailableError("it is away")
        if self.state == "breaks":
            raise InternalError("the password is another")
        if self.state == "is silent":
            await asyncio.Event().wait()


@pytest.mark.parametrize("state", ["refuses", "breaks", "is silent"])
async def test_a_server_without_its_database_says_so_and_comes_back(state: str) -> None:
    clock, database = DrivenClock(), Database()
    nodes: Any = None
    store: Any = database
    readiness = Readiness(store, nodes, clock)
    looking = asyncio.create_task(readiness.run())

    async def drive(seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            await clock.advance(0.1)
            await asyncio.sleep(0)

    for _ in range(2):
        await drive(10)
        assert readiness.cannot_serve is None
        database.state = state
        await drive(1.3)
        assert readiness.cannot_serve is None
        await drive(1.5)
        assert readiness.cannot_serve is not None
        await drive(60)
        assert readiness.cannot_serve is not None
        database.state = "answers"
        await drive(5)
        assert readiness.cannot_serve is None
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
