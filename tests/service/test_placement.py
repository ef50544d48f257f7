"""Where a sandbox goes, by what nodes say of themselves."""

import logging
from typing import Any

import pytest
from tests.support.clock import DrivenClock
from tests.support.nodes import FakeNode

from sandyard.server.core.contracts.node import VIEW_MAX, GoldenFact, NodeView, ShelfFact
from sandyard.server.core.errors import NoCapacityError
from sandyard.server.core.node_ops import Report
from sandyard.server.core.shapes import Shape
from sandyard.server.service.nodes import Nodes
from sandyard.server.service.placement import Placement
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.roster import Heartbeat

SHAPE = Shape(1, 512, 1024)


class Yard:
    """Three nodes with room for ten each, asked once and then gone by as of that moment."""

    def __init__(self) -> None:
        self.clock = DrivenClock()
        self.fakes = {name: FakeNode(name) for name in ("one", "two", "three")}
        for fake in self.fakes.values():
            fake.room = 10
        self.nodes = Nodes(self.fakes, self.clock)
        self.placement = Placement(self.nodes, self.clock, by_lot=True)

    async def ask(self) -> None:
        for node in self.nodes.all():
            await self.nodes.report_of(node)

    async def chosen(self, count: int, shape: Shape = SHAPE) -> dict[str, int]:
        found = [(await self.placement.choose("base-minimal", shape)).node_id for _ in range(count)]
        return {name: found.count(name) for name in self.fakes}


@pytest.fixture
def yard() -> Yard:
    return Yard()


async def test_where_a_machine_waits_goes_before_where_a_golden_one_is_and_that_before_others(
    yard: Yard,
) -> None:
    one, two, _ = yard.fakes.values()
    one.room = two.room = 5  # the third has most room
    two.goldens = (GoldenFact("base-minimal", 1, 512), GoldenFact("base-minimal", 2, 1024))
    one.shelves = (
        ShelfFact("base-minimal", 1, 512, 1024, size=2, target=2),
        ShelfFact("base-minimal", 1, 512, 5120, size=3, target=3),
    )
    await yard.ask()
    # Two wait, for the others' disks are larger; then they are taken, and it is as good as others.
    assert await yard.chosen(2) == {"one": 2, "two": 0, "three": 0}
    assert await yard.chosen(3) == {"one": 0, "two": 3, "three": 0}
    # Of another shape neither is there.
    for fake in yard.fakes.values():
        fake.room = 1000
    await yard.clock.advance(5)
    await yard.ask()
    assert min((await yard.chosen(60, Shape(4, 512, 1024))).values()) > 0
    one.shelves = (ShelfFact("base-minimal", 1, 512, 1024, size=0, target=2),)
    one.goldens = (GoldenFact("base-ubuntu", 1, 512),)
    two.goldens = (GoldenFact("base-minimal", 2, 1024),)
    await yard.clock.advance(5)
    await yard.ask()
    assert min((await yard.chosen(60)).values()) > 0


async def test_a_version_is_found_among_thousands(yard: Yard) -> None:
    every = (*(f"a@{number:016x}00000000" for number in range(3000)), "zz@" + "f" * 24)
    yard.fakes["one"].templates_ready += every
    await yard.ask()
    assert (await yard.placement.choose(every[-1], SHAPE)).node_id == "one"


async def test_a_heartbeat_without_room_for_all_versions_is_completed_by_a_report(
    yard: Yard,
) -> None:
    every = (*(f"a@{number:016x}00000000" for number in range(5000)), "zz@" + "f" * 24)
    one = yard.fakes["one"]
    one.templates_ready += every
    view = (await one.do(Report())).view().within(VIEW_MAX)
    assert not view.has(every[-1])
    assert view.has(every[0])
    assert view.is_unsure_of(every[-1])
    roster = BeatingRoster(yard, {"one": view})
    nodes = Nodes(yard.fakes, yard.clock, roster=roster)  # type: ignore[arg-type]
    placement = Placement(nodes, yard.clock, by_lot=True)
    one.asked.clear()
    for _ in range(2):
        assert (await placement.choose(every[-1], SHAPE)).node_id == "one"
    assert one.asked.count("report") == 1


class BeatingRoster:
    """A roster whose nodes have sent a heartbeat just now."""

    def __init__(self, yard: Yard, views: dict[str, NodeView]) -> None:
        self._yard, self._views = yard, views

    def takes_new(self, node_id: str) -> bool:
        return True

    is_there = takes_new

    def last_heartbeat(self, node_id: str) -> Heartbeat | None:
        view = self._views.get(node_id)
        return None if view is None else Heartbeat(self._yard.clock.monotonic(), 1, view)


async def test_what_was_placed_since_a_node_spoke_is_counted(yard: Yard) -> None:
    await yard.ask()
    # Ten fit on each, by what they said before any came.
    assert await yard.chosen(30) == {"one": 10, "two": 10, "three": 10}
    await yard.clock.advance(5)
    await yard.ask()  # and they say that none of those is there any more
    assert await yard.chosen(30) == {"one": 10, "two": 10, "three": 10}
    # The nodes have the last word: nothing is refused by a count.
    assert sum((await yard.chosen(3)).values()) == 3


async def test_who_has_no_room_is_passed_over_also_where_it_said_otherwise(yard: Yard) -> None:
    await yard.ask()
    yard.fakes["one"].room = yard.fakes["two"].room = 0
    assert await yard.chosen(5) == {"one": 0, "two": 0, "three": 5}
    yard.fakes["three"].room = 0
    with pytest.raises(NoCapacityError, match="memory"):
        await yard.chosen(1)
    yard.fakes["one"].room = 1
    assert await yard.chosen(1) == {"one": 1, "two": 0, "three": 0}


async def test_who_cannot_start_machines_is_asked_last(yard: Yard) -> None:
    one = yard.fakes["one"]
    one.goldens = (GoldenFact("base-minimal", 1, 512),)
    one.missing = ("no hypervisor was found",)
    await yard.ask()
    assert (await yard.chosen(10))["one"] == 0
    store: Any = None
    readiness = Readiness(store, yard.nodes, yard.clock)
    assert await readiness.limited() == ["node one: no hypervisor was found"]
    one.missing = ()
    await yard.clock.advance(5)
    await yard.ask()
    assert (await yard.chosen(5))["one"] == 5


async def test_the_room_of_who_cannot_start_machines_keeps_nobody_from_being_asked(
    yard: Yard,
) -> None:
    yard.fakes["one"].missing = ("no hypervisor was found",)
    await yard.nodes.report_of(yard.nodes.get("one"))  # the others have said nothing yet
    assert (await yard.chosen(3))["one"] == 0


async def test_whose_start_has_failed_is_asked_last_for_some_minutes(
    yard: Yard, caplog: pytest.LogCaptureFixture
) -> None:
    yard.fakes["one"].goldens = (GoldenFact("base-minimal", 1, 512),)
    await yard.ask()
    with caplog.at_level(logging.WARNING):
        yard.placement.note_failure("one", "the machine ended while it started")
    assert "node one could not start a machine" in caplog.text
    assert (await yard.chosen(10))["one"] == 0
    await yard.clock.advance(200)
    await yard.ask()
    assert (await yard.chosen(5))["one"] == 5


async def test_who_says_nothing_is_not_waited_for_where_others_have_room(yard: Yard) -> None:
    one, two, three = yard.fakes.values()
    await yard.nodes.report_of(yard.nodes.get("one"))
    two.asked.clear()
    assert await yard.chosen(10) == {"one": 10, "two": 0, "three": 0}
    assert two.asked == three.asked == []
    one.room = 0
    await yard.clock.advance(5)
    await yard.nodes.report_of(yard.nodes.get("one"))
    three.is_silent = True
    assert await yard.chosen(5) == {"one": 0, "two": 5, "three": 0}
    assert "report" in three.asked
    # It is asked after all where whoever said so has no room.
    await yard.clock.advance(15)
    one.room, three.is_silent = 1, False
    await yard.nodes.report_of(yard.nodes.get("one"))
    one.room = two.room = 0
    assert await yard.chosen(1) == {"one": 0, "two": 0, "three": 1}
