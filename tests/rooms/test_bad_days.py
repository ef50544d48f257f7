"""Database locked or gone, disk full: requests say so, nothing is half-written, and it passes."""

import asyncio
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url
from tests.support.house import Yard, eventually, open_yard, until
from tests.support.ports import free_port
from tests.support.postgres import postgres_url

from sandyard.server.fakes.driver import FakeMachine
from sandyard.server.node.host.disks import lacks_files

pytestmark = pytest.mark.slow  # they wait as long as a bad day lasts


async def whole(yard: Yard) -> int:
    """Check that what is stored belongs together, and return how many sandboxes there are."""
    boxes = (await yard.client.get("/v1/sandboxes")).json()["data"]
    for box in boxes:
        feed = (await yard.client.get(f"/v1/sandboxes/{box['id']}/activity")).json()["data"]
        kinds = [one["eventType"] for one in feed["events"]]
        assert kinds[-1] == "sandbox.created"
        async with yard.house.store.read() as tx:
            periods = await tx.usage.of_sandbox(box["id"])
        is_open = [one for one in periods if one.ended_at is None]
        assert len(is_open) == (1 if box["status"] == "running" else 0)
    return len(boxes)


def is_503(answer: Any) -> bool:
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    return True


async def test_a_database_that_is_locked_for_ten_seconds_is_waited_for_or_a_503(
    tmp_path: Path,
) -> None:
    async with open_yard(tmp_path) as yard:
        box = await yard.create()
        other = sqlite3.connect(tmp_path / "sandyard.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        try:
            asked = [
                asyncio.create_task(yard.client.post(path, json=body))
                for path, body in (
                    ("/v1/sandboxes", {}),
                    ("/v1/api-keys", {"name": "k"}),
                    (f"/v1/sandboxes/{box['id']}/touch", {}),
                    ("/v1/billing/grants", {"amountCents": 5}),
                )
            ]
            # What only reads is served meanwhile.
            got = await yard.client.get(f"/v1/sandboxes/{box['id']}")
            assert got.status_code == 200
            answers = await asyncio.gather(*asked)
        finally:
            other.rollback()
            other.close()
        assert all(is_503(one) for one in answers)
        assert await whole(yard) == 1
        assert len((await yard.client.get("/v1/api-keys")).json()["data"]) == 1
        account = (await yard.client.get("/v1/billing/credits")).json()["data"]
        assert account["balanceCents"] == 10_000
        await yard.create()
        assert await whole(yard) == 2


class Wire:
    """Carries connections to a server until it is cut."""

    def __init__(self, port: int, to: int) -> None:
        self.port, self._to = port, to
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers |= {writer, back}

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))
        self._writers -= {writer, back}


@asynccontextmanager
async def wired(url: str) -> AsyncIterator[tuple[str, Wire]]:
    parsed = make_url(url)
    assert parsed.port is not None
    wire = Wire(free_port(), parsed.port)
    await wire.mend()
    try:
        yield parsed.set(port=wire.port).render_as_string(hide_password=False), wire
    finally:
        await wire.cut()


@pytest.mark.postgres
async def test_a_database_that_is_gone_for_a_while_is_a_503_until_it_is_back(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as held:
        url, wire = await held.enter_async_context(
            wired(await held.enter_async_context(postgres_url()))
        )
        async with open_yard(tmp_path, sections={"store": {"url": url}}) as yard:
            box = await yard.create()
            await wire.cut()
            for _ in range(3):
                answers = await asyncio.gather(
                    yard.client.get("/v1/sandboxes"),
                    yard.client.post("/v1/sandboxes", json={}),
                    yard.client.post("/v1/api-keys", json={"name": "k"}),
                    yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json={"command": "x"}),
                )
                assert all(is_503(one) for one in answers)
                await asyncio.sleep(0.1)
            ready = await yard.client.get("/readyz")
            assert ready.status_code == 503
            await wire.mend()

            async def is_back() -> bool:
                return (await yard.client.get("/v1/sandboxes")).status_code == 200

            await eventually(is_back)
            # The machine never noticed, and the reconciler works on.
            assert await yard.execute(box, "here") == "here"
            await yard.create()
            assert await whole(yard) == 2


# --- a disk that fills up -----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small enough to be filled."""
    home = tmp_path / "small"
    home.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m,mode=755,nr_inodes=4000", "small", str(home)],
        check=True,
    )
    try:
        yield home
    finally:
        subprocess.run(["umount", str(home)], check=True)


async def write_until_held(machine: FakeMachine) -> None:
    """Have a machine's disk grow, little by little, until its node holds it still."""
    async with asyncio.timeout(60):
        with machine.spec.disk.open("ab", buffering=0) as disk:
            while not machine.is_held:
                disk.write(bytes(2**20))
                await asyncio.sleep(0.05)


@pytest.mark.root
async def test_a_full_disk_is_told_and_blocks_no_way_out(small_disk: Path) -> None:
    async with open_yard(small_disk, saves=True, disk_floor_mib=64) as yard:
        quiet, loud = await yard.create(), await yard.create()
        yard.machine_of(quiet).spec.disk.write_bytes(bytes(150 * 2**20))  # large, and idle
        ballast = small_disk / "ballast"
        await until(ballast.exists)
        assert (await yard.client.get("/readyz")).status_code == 200
        await write_until_held(yard.machine_of(loud))
        # The one that wrote is held still, in time, and says why; the other goes on.
        told = await yard.get(loud)
        await eventually(lambda: _reason_is(yard, loud, "host_disk_full"))
        assert told["status"] == "running"
        for _ in range(3):
            await yard.house.node._pressure.look()
        assert not yard.machine_of(quiet).is_held
        unready = await yard.client.get("/readyz")
        assert unready.status_code == 503
        assert "disk is full" in unready.text
        refused = await yard.client.post("/v1/sandboxes", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
        # To save it would take room, too, and would have to let it go on.
        for action in ("pause", "snapshots"):
            answer = await yard.client.post(f"/v1/sandboxes/{loud['id']}/{action}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_capacity")
            assert yard.machine_of(loud).is_held
        # And where something else takes the very last byte, what makes room still works.
        with (small_disk / "other").open("wb", buffering=0) as other, suppress(OSError):
            while True:
                other.write(bytes(2**16))
        await until(lambda: not ballast.exists())
        for box in (loud, quiet):
            await eventually(lambda box=box: _is_deleted(yard, box))  # type: ignore[misc]
        (small_disk / "other").unlink()
        assert (await yard.create())["status"] == "running"
        await until(ballast.exists)


@pytest.mark.root
async def test_a_disk_that_takes_no_more_files_is_told(small_disk: Path) -> None:
    async with open_yard(small_disk, saves=True, disk_floor_mib=64) as yard:
        box = await yard.create()
        await yard.client.get("/readyz")
        (small_disk / "many").mkdir()
        with suppress(OSError):
            for number in range(4000):
                (small_disk / "many" / str(number)).touch()
        refused = await yard.client.post("/v1/sandboxes", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
        assert "inodes" in refused.json()["error"]["message"]
        unready = await yard.client.get("/readyz")
        assert (unready.status_code, "inodes" in unready.text) == (503, True)
        assert "inodes" in (lacks_files(small_disk) or "")
        # What makes room still works.
        await eventually(lambda: _is_deleted(yard, box))
        shutil.rmtree(small_disk / "many")
        assert (await yard.create())["status"] == "running"


@pytest.mark.root
async def test_what_was_held_still_for_the_disk_goes_on_once_there_is_room(
    small_disk: Path,
) -> None:
    async with open_yard(small_disk, saves=True, disk_floor_mib=64) as yard:
        box = await yard.create()
        filler = small_disk / "filler"
        filler.write_bytes(bytes(120 * 2**20))
        machine = yard.machine_of(box)
        await write_until_held(machine)
        filler.unlink()
        await until(lambda: not machine.is_held)
        assert await yard.execute(box, "on") == "on"
        await eventually(lambda: _reason_is(yard, box, None))


async def _is_deleted(yard: Yard, box: Mapping[str, object]) -> bool:
    answer = await yard.client.delete(f"/v1/sandboxes/{box['id']}")
    # For a moment it may still be said that the disk is full, and to try again.
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 200


async def _reason_is(yard: Yard, box: Mapping[str, object], code: str | None) -> bool:
    reason: Any = (await yard.get(box))["statusReason"]
    return (reason["code"] if reason else None) == code
