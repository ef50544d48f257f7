"""Which templates and versions are copied from which node to which."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.clock import DrivenClock

from sandyard.server.core.contracts.node import (
    MachineRef,
    NodeReport,
    NodeView,
    Opened,
    TemplateFact,
    TemplateStatus,
)
from sandyard.server.core.copies import CopiedFile, Copy, ReadCopy, Wanted, WriteCopy
from sandyard.server.core.errors import (
    DamagedError,
    NoCapacityError,
    NotFoundError,
    UnavailableError,
)
from sandyard.server.core.node_ops import DropVersion
from sandyard.server.core.records import VersionKey
from sandyard.server.core.shapes import Shape
from sandyard.server.service.builds.copies import Copies

NOW = datetime(2026, 5, 6, tzinfo=UTC)
READY = TemplateFact(
    "base", "Base", "", "headless", TemplateStatus.READY, Shape(1, 512, 1024), digest="one",
    created_at=NOW,
)  # fmt: skip
PENDING = replace(READY, status=TemplateStatus.PENDING, digest=None, created_at=None)
VERSION = VersionKey("org", "mine", "d" * 24)
NAME = f"mine@{VERSION.digest}"


@dataclass
class Hosts:
    """Nodes with what each has, and the tunnels to them."""

    facts: Mapping[str, tuple[TemplateFact, ...]] = field(default_factory=dict)
    told: dict[str, tuple[str, ...]] = field(default_factory=dict)
    versions: list[VersionKey] = field(default_factory=list)
    drained: frozenset[str] = frozenset()
    away: frozenset[str] = frozenset()
    errors: dict[str, Exception] = field(default_factory=dict)
    lies: dict[str, Copy] = field(default_factory=dict)
    copied: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    deleted: bool = False

    def ids(self) -> list[str]:
        return [*self.facts]

    def is_there(self, node_id: str) -> bool:
        return node_id not in self.away

    def takes_new(self, node_id: str) -> bool:
        return node_id not in self.drained

    def last_view(self, node_id: str) -> tuple[float, NodeView]:
        told = NodeReport(node_id, (), templates=("base",), versions=self.told.get(node_id, ()))
        return 0.0, told.view()

    def has(self, node_id: str) -> bool:
        return node_id in self.facts

    def get(self, node_id: str) -> Any:
        async def do(operation: DropVersion) -> None:
            self.dropped.append((node_id, operation.version))

        return SimpleNamespace(do=do)

    async def report_of(self, node: object) -> None: ...

    async def by_node(self) -> Mapping[str, tuple[TemplateFact, ...]]:
        return self.facts

    @asynccontextmanager
    async def open(self, machine: MachineRef, operation: Any) -> AsyncIterator[Opened[Any]]:
        if (error := self.errors.get(machine.node_id)) is not None:
            raise error
        if isinstance(operation, ReadCopy):
            digests = {one.slug: one.digest or "" for one in self.facts[machine.node_id]}
            plain = Copy(
                operation.name, digests.get(operation.name, ""), (CopiedFile("root.erofs", 5),)
            )
            copy = self.lies.get(machine.node_id, plain)
            yield Opened(copy, _Stream(machine.node_id.encode()))
        else:
            assert isinstance(operation, WriteCopy)
            stream = _Stream(b"")
            yield Opened(Wanted(True), stream)
            assert stream.is_over
            source = bytes(stream.written).decode()
            self.copied.append((operation.copy.name, source, machine.node_id))

    # --- the store and the nodes' own ---------------------------------------------------------

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Any]:
        async def every() -> list[VersionKey]:
            return self.versions

        async def is_kept(_: VersionKey) -> bool:
            return not self.deleted

        yield SimpleNamespace(versions=SimpleNamespace(every=every, is_kept=is_kept))

    @asynccontextmanager
    async def write(self, _: object) -> AsyncIterator[Any]:
        async def take(*_: object, **__: object) -> bool:
            return True

        yield SimpleNamespace(duties=SimpleNamespace(take=take))


class _Stream:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.written = bytearray()
        self.is_over = False

    async def read(self, limit: int) -> bytes:
        data, self._data = self._data[:limit], self._data[limit:]
        return data

    async def write(self, data: bytes) -> None:
        self.written += data

    async def write_eof(self) -> None:
        self.is_over = True


async def look(hosts: Hosts, times: int = 1) -> list[tuple[str, str, str]]:
    """Look once, or several times, and return what was copied: its name, from where, to where."""
    copies = copies_of(hosts, DrivenClock(NOW))
    for _ in range(times):
        await copies._look()
    return hosts.copied


def copies_of(hosts: Hosts, clock: DrivenClock) -> Copies:
    platform: Any = SimpleNamespace(
        server_id="s", store=hosts, bus=None, clock=clock, nodes=hosts, tunnel=hosts,
        templates=SimpleNamespace(shipped=hosts),
    )  # fmt: skip
    return Copies(platform)


async def test_nodes_that_lack_a_template_receive_the_newest_that_was_built() -> None:
    later = replace(READY, digest="two", created_at=NOW + timedelta(seconds=9))
    building = replace(PENDING, status=TemplateStatus.BUILDING)
    failed = replace(PENDING, status=TemplateStatus.FAILED)
    facts = {
        "built": (READY,), "later": (later,), "empty": (PENDING,), "failed": (failed,),
        "builds": (building,), "old copy": (replace(READY, is_copy=True),),
        "copy": (replace(later, is_copy=True),), "full": (PENDING,), "away": (PENDING,),
    }  # fmt: skip
    hosts = Hosts(facts, drained=frozenset({"full"}), away=frozenset({"away"}))
    assert sorted(await look(hosts)) == [
        ("base", "later", one) for one in ("empty", "failed", "old copy")
    ]


async def test_a_copy_is_not_replaced_by_an_older_image() -> None:
    older = replace(READY, created_at=NOW - timedelta(days=1), digest="older")
    assert await look(Hosts({"a": (older,), "b": (replace(READY, is_copy=True),)})) == []


async def test_a_copy_is_no_source_and_neither_is_what_will_be_built_some_day() -> None:
    assert await look(Hosts({"a": (replace(READY, is_copy=True),), "b": (PENDING,)})) == []
    some_day = replace(READY, digest="x", created_at=NOW + timedelta(days=36_500))
    hosts = Hosts({"evil": (some_day,), "good": (READY,), "empty": (PENDING,)})
    assert await look(hosts) == [("base", "good", "empty")]


@pytest.mark.parametrize("lie", [{"name": "base-ubuntu"}, {"digest": "other"}])
async def test_a_node_that_gives_something_else_changes_nothing(lie: dict[str, str]) -> None:
    copy = replace(Copy("base", "one", (CopiedFile("root.erofs", 4),)), **lie)  # type: ignore[arg-type]
    hosts = Hosts({"evil": (READY,), "empty": (PENDING,)}, lies={"evil": copy})
    assert await look(hosts) == []


async def test_a_version_goes_to_every_node_from_any_that_has_it() -> None:
    facts = {one: (READY,) for one in ("here", "also", "lacks", "full")}
    hosts = Hosts(
        facts, told={"here": (NAME,), "also": (NAME,)}, versions=[VERSION],
        drained=frozenset({"full"}),
    )  # fmt: skip
    assert await look(hosts) == [(NAME, "here", "lacks")]
    hosts.copied.clear()
    hosts.errors["here"] = DamagedError("its disk is bad")
    assert await look(hosts, times=2) == [(NAME, "also", "lacks")] * 2


async def test_what_failed_is_not_tried_again_at_once() -> None:
    hosts = Hosts({"here": (READY,), "lacks": (READY,)}, {"here": (NAME,)}, [VERSION])
    asked = []
    opening = hosts.open

    def open_(machine: MachineRef, operation: Any) -> Any:
        asked.append(machine.node_id)
        return opening(machine, operation)

    hosts.open = open_  # type: ignore[method-assign]
    hosts.errors["lacks"] = UnavailableError("it does not answer")
    assert await look(hosts, times=3) == []
    assert asked == ["here", "lacks"]


async def test_a_copy_that_was_broken_off_is_tried_again_soon() -> None:
    hosts = Hosts({"here": (READY,), "lacks": (READY,)}, {"here": (NAME,)}, [VERSION])
    clock = DrivenClock(NOW)
    copies = copies_of(hosts, clock)
    hosts.errors["lacks"] = UnavailableError("the connection has ended")
    await copies._look()
    hosts.errors.clear()
    await clock.advance(10)
    await copies._look()
    assert hosts.copied == [(NAME, "here", "lacks")]
    # One that keeps failing is tried less and less often.
    hosts.errors["lacks"] = NoCapacityError("its disk is full")
    await copies._look()
    await clock.advance(200)
    hosts.errors.clear()
    await copies._look()
    assert len(hosts.copied) == 1


async def test_many_versions_on_many_nodes_do_not_block_the_server() -> None:
    versions = [VersionKey("org", "mine", f"{number:016x}00000000") for number in range(300)]
    names = tuple(f"mine@{one.digest}" for one in versions)
    nodes = [f"node-{number}" for number in range(50)]
    hosts = Hosts({one: (READY,) for one in nodes}, dict.fromkeys(nodes, names), versions)
    looked = 0
    is_there = hosts.is_there

    def counted(node_id: str) -> bool:
        nonlocal looked
        looked += 1
        return is_there(node_id)

    hosts.is_there = counted  # type: ignore[method-assign]
    assert await look(hosts) == []
    assert looked < 4 * len(nodes), "not for each version"


async def test_a_version_that_is_deleted_meanwhile_is_removed_again() -> None:
    hosts = Hosts({"here": (READY,), "lacks": (READY,)}, {"here": (NAME,)}, [VERSION], deleted=True)
    await look(hosts)
    assert hosts.dropped == [("lacks", NAME)]
    # Also if the connection broke when all was there.
    hosts = Hosts({"here": (READY,), "lacks": (READY,)}, {"here": (NAME,)}, [VERSION], deleted=True)
    hosts.errors["here"] = NotFoundError("it is not here")
    await look(hosts)
    assert hosts.dropped == [("lacks", NAME)]
