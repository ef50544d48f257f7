"""How control planes share out the nodes that they compare."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from tests.support.clock import DrivenClock
from tests.support.store import place_database

from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.records import JoinedNode
from sandyard.server.links.sql import open_store
from sandyard.server.service.reconcile.shares import LASTS, Shares
from sandyard.server.service.roster import Roster

_COUNT = 12


@dataclass
class Peers:
    """Control planes of one store, of which each hears or not."""

    store: Store
    clock: DrivenClock
    shares: dict[str, Shares] = field(default_factory=dict)
    deaf: set[str] = field(default_factory=set)
    rosters: dict[str, Roster] = field(default_factory=dict)
    unreached: dict[str, set[str]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        roster = Roster(self.store, self.clock, can_hear=lambda: name not in self.deaf)
        self.rosters[name] = roster
        self.shares[name] = Shares(name, self.store, roster)

    def kill(self, name: str) -> None:
        del self.shares[name], self.rosters[name]

    async def look(self, *, times: int = 1) -> dict[str, int]:
        """Have every one of them look, two seconds apart; return how many nodes each has."""
        for _ in range(times):
            for name, shares in self.shares.items():
                await self.rosters[name].refresh()
                await shares.refresh(self.unreached.get(name, set()))
            await self.clock.advance(2)
        return {name: len(one.own) for name, one in self.shares.items()}

    def everything(self) -> list[str]:
        return sorted(node_id for one in self.shares.values() for node_id in one.own)


@pytest.fixture
async def peers(tmp_path: Path) -> AsyncIterator[Peers]:
    place_database(tmp_path / "sandyard.db")
    clock = DrivenClock()
    url = f"sqlite:///{tmp_path / 'sandyard.db'}"
    async with open_store(url, key=bytes(32), clock=clock) as store:
        for number in range(_COUNT):
            async with store.write(Turn.ALONE) as tx:
                node = JoinedNode(f"node-{number:02}", f"node-{number}", clock.now())
                await tx.joined_nodes.add(node)
        yield Peers(store, clock)


async def test_one_has_all_and_whoever_comes_takes_a_fair_share(peers: Peers) -> None:
    peers.start("a")
    assert await peers.look() == {"a": 12}
    peers.start("b")
    assert await peers.look(times=3) == {"a": 6, "b": 6}
    peers.start("c")
    counts = await peers.look(times=6)
    assert sorted(counts.values()) == [3, 4, 5] or sorted(counts.values()) == [4, 4, 4]
    assert peers.everything() == [f"node-{number:02}" for number in range(_COUNT)]
    assert await peers.look(times=5) == counts, "they come to rest"


async def test_what_one_had_that_is_gone_is_taken_up_in_time(peers: Peers) -> None:
    for name in ("a", "b", "c"):
        peers.start(name)
    await peers.look(times=6)
    peers.kill("a")
    await peers.look(times=2)
    assert len(peers.everything()) < _COUNT, "its time has not run out"
    counts = await peers.look(times=int(LASTS / timedelta(seconds=2)) + 6)
    assert peers.everything() == [f"node-{number:02}" for number in range(_COUNT)]
    assert max(counts.values()) - min(counts.values()) <= 1


async def test_whoever_hears_no_node_leaves_them_to_whoever_does(peers: Peers) -> None:
    peers.start("a")
    peers.start("b")
    await peers.look(times=3)
    peers.deaf.add("a")
    assert await peers.look(times=6) == {"a": 0, "b": 12}
    peers.deaf.clear()
    assert await peers.look(times=6) == {"a": 6, "b": 6}


async def test_where_nobody_hears_a_node_somebody_looks_all_the_same(peers: Peers) -> None:
    peers.start("a")
    await peers.look()
    peers.deaf.add("a")
    seen = [(await peers.look())["a"] for _ in range(12)]
    assert 12 in seen[6:]


async def test_whoever_stood_still_gives_up_what_others_took(peers: Peers) -> None:
    for name in ("a", "b"):
        peers.start(name)
    await peers.look(times=3)
    still = peers.shares["a"], peers.rosters["a"]
    peers.kill("a")
    await peers.look(times=8)
    peers.shares["a"], peers.rosters["a"] = still
    await peers.shares["a"].refresh()  # by what it knew
    async with peers.store.read() as tx:
        on_record = {one.id for one in await tx.joined_nodes.all() if one.compared_by == "a"}
    assert peers.shares["a"].own <= on_record < {*peers.everything()}
    await peers.look(times=5)
    assert peers.everything() == [f"node-{number:02}" for number in range(_COUNT)]


async def test_what_one_cannot_reach_goes_to_another(peers: Peers) -> None:
    peers.start("a")
    peers.start("b")
    await peers.look(times=3)
    cut = min(peers.shares["a"].own)
    peers.unreached["a"] = {cut}
    await peers.look(times=6)
    assert cut in peers.shares["b"].own
    assert cut not in peers.shares["a"].own
    assert peers.everything() == [f"node-{number:02}" for number in range(_COUNT)]


async def test_what_nobody_else_is_there_for_stays_although_it_cannot_be_reached(
    peers: Peers,
) -> None:
    peers.start("a")
    await peers.look()
    peers.unreached["a"] = {"node-03"}
    seen = [(await peers.look())["a"] for _ in range(12)]
    assert 12 in seen[6:]
