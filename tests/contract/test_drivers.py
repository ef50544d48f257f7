"""The examination every driver passes: the fake, and QEMU on real machines."""

import asyncio
import gc
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.drivers import (
    BENCHES,
    NEEDS_KVM,
    Bench,
    fake_bench,
    mount,
    saved_machine,
    until_it_speaks,
)

from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    NoCapacityError,
    SandyardError,
)
from sandyard.server.drivers.background import Background
from sandyard.server.drivers.contract import ProbeSpec
from sandyard.server.fakes.driver import FakeDriver


@pytest.fixture(
    params=[
        "fake",
        pytest.param("qemu", marks=pytest.mark.machine),
        pytest.param("firecracker", marks=[pytest.mark.machine, NEEDS_KVM]),
    ]
)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as held:
        made = await BENCHES[request.param](tmp_path, held)
        yield made
        assert not await made.left(), "the driver left something behind"


async def test_a_machine_starts_speaks_and_stops(bench: Bench) -> None:
    async with AsyncExitStack() as held:
        machine = await bench.driver.start(bench.spec, held)
        assert machine.pid > 0
        await until_it_speaks(bench, machine, matters=True)
        assert await machine.stall() is None
        await machine.stop()
        await machine.stop()
        assert not await bench.left()


async def test_a_machine_started_ahead_gives_way_until_it_comes_forward(bench: Bench) -> None:
    async with AsyncExitStack() as held:
        entry = held.enter_context(Background().entry())
        machine = await bench.driver.start(replace(bench.spec, background=entry), held)
        assert bench.is_behind(machine.pid)
        machine.come_forward()
        assert not bench.is_behind(machine.pid)
        await machine.stop()
        machine.come_forward()


async def test_what_start_pushed_releases_everything(bench: Bench) -> None:
    held = AsyncExitStack()
    await bench.driver.start(bench.spec, held)
    assert await bench.left()
    await held.aclose()
    assert not await bench.left()


@pytest.mark.parametrize("turns", [1, 2, 3, 100, 200, 300, 400, 500])
async def test_a_start_broken_off_at_any_moment_leaves_nothing(bench: Bench, turns: int) -> None:
    async with AsyncExitStack() as held:
        starting = asyncio.create_task(bench.driver.start(bench.spec, held))
        for _ in range(turns):
            await asyncio.sleep(0 if turns < 10 else 0.0002)
        starting.cancel()
        await asyncio.wait([starting])
    assert not await bench.left()
    del starting
    gc.collect()  # a socket or a pipe left open is a warning, which is an error here


async def test_a_death_is_noticed_at_once_and_also_afterwards(bench: Bench) -> None:
    async with AsyncExitStack() as held:
        machine = await bench.driver.start(bench.spec, held)
        waiting = asyncio.ensure_future(machine.wait())
        await asyncio.sleep(0)
        bench.kill(machine.pid)
        async with asyncio.timeout(5):
            assert (await waiting).code == "machine_died"
            assert (await machine.wait()).code == "machine_died"


async def test_a_later_process_finds_the_machine_by_its_stored_handle(bench: Bench) -> None:
    first = AsyncExitStack()
    machine = await bench.driver.start(bench.spec, first)
    stored = json.loads(json.dumps(dict(machine.handle)))
    first.pop_all()
    await machine.detach()
    async with AsyncExitStack() as held:
        found = await bench.again().recover(stored, held)
        assert found is not None
        assert found.pid == machine.pid
        assert dict(found.handle) == stored
        await found.stop()


async def test_a_dead_machine_is_not_recovered_and_leaves_nothing(bench: Bench) -> None:
    first = AsyncExitStack()
    machine = await bench.driver.start(bench.spec, first)
    stored = dict(machine.handle)
    first.pop_all()
    await machine.detach()
    bench.kill(machine.pid)
    async with asyncio.timeout(5), AsyncExitStack() as held:
        while await bench.left():
            await asyncio.sleep(0.01)
        assert await bench.again().recover(stored, held) is None


async def test_a_start_that_cannot_be_says_why_and_leaves_nothing(bench: Bench) -> None:
    if bench.driver.name == "fake":
        assert isinstance(bench.driver, FakeDriver)
        bench.driver.conduct.starts = False
    spec = replace(bench.spec, roots=(Path("/nowhere/root.erofs"),))
    async with AsyncExitStack() as held:
        with pytest.raises(SandyardError, match="cannot start") as refused:
            await bench.driver.start(spec, held)
    assert bench.driver.name == "fake" or "root.erofs" in str(refused.value)
    async with asyncio.timeout(5):  # it has given up, and may be about to end
        while await bench.left():
            await asyncio.sleep(0.01)


async def test_the_probe_gives_a_verdict_and_never_raises(bench: Bench, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    spec = ProbeSpec(
        kernel=bench.spec.kernel,
        initrd=bench.spec.initrd,
        scratch=scratch,
        limit_s=20 if not bench.verdict.is_usable else 60 * bench.pace,
        arguments=bench.spec.arguments,
        has_acpi=bench.spec.has_acpi,
    )
    verdict = await bench.driver.probe(spec)
    assert verdict.is_usable == bench.verdict.is_usable
    assert verdict.reason
    assert await bench.driver.version()


async def test_a_driver_that_leaks_is_found_out(tmp_path: Path) -> None:
    """The check at the end of every exam sees what a badly behaved driver leaves."""
    async with AsyncExitStack() as held:
        bench = await fake_bench(tmp_path, held)
        assert isinstance(bench.driver, FakeDriver)
        bench.driver.conduct.leaks = True
        async with AsyncExitStack() as inner:
            machine = await bench.driver.start(bench.spec, inner)
            await machine.stop()
        assert await bench.left()


REAL = pytest.mark.parametrize("name", ["qemu", pytest.param("firecracker", marks=NEEDS_KVM)])


@pytest.mark.machine
@REAL
async def test_a_busy_tap_is_refused_in_words(tmp_path: Path, name: str) -> None:
    async with AsyncExitStack() as held:
        bench = await BENCHES[name](tmp_path, held)
        async with AsyncExitStack() as inner:
            await bench.driver.start(bench.spec, inner)
            with pytest.raises(InternalError):
                await bench.driver.start(bench.spec, inner)


@pytest.mark.machine
@REAL
async def test_a_hypervisor_is_confined(tmp_path: Path, name: str) -> None:
    """No capability, no way to gain one, seccomp on, its own account and namespace."""
    async with AsyncExitStack() as held:
        bench = await BENCHES[name](tmp_path, held)
        async with AsyncExitStack() as inner:
            machine = await bench.driver.start(bench.spec, inner)
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{machine.pid}/status").read_text().splitlines()
                if ":\t" in line
            )
            uid = str(bench.spec.place.uid)
            assert status["Uid"].split() == [uid] * 4
            assert status["Gid"].split() == [uid] * 4
            assert status["Groups"].strip() == ""
            # The jailer leaves the bounding set; without new privileges it bounds nothing.
            bounding = ["CapBnd"] if name == "qemu" else []
            for one in ("CapInh", "CapPrm", "CapEff", "CapAmb", *bounding):
                assert int(status[one], 16) == 0, one
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == "2"
            own, hosts = (os.stat(f"/proc/{one}/ns/net") for one in (machine.pid, "self"))
            assert own.st_ino != hosts.st_ino
            # It is nobody's child and leads its own session: the server's end is not its end.
            stat_fields = Path(f"/proc/{machine.pid}/stat").read_text().rpartition(")")[2].split()
            assert int(stat_fields[1]) != os.getpid()
            assert os.getsid(machine.pid) != os.getsid(0)


async def test_a_saved_machine_is_restored_standing_still_and_goes_on(
    bench: Bench, tmp_path: Path
) -> None:
    saved = await saved_machine(bench, tmp_path / "saved")
    async with AsyncExitStack() as held:
        machine = await bench.saver.restore(bench.spec, saved, held)
        assert await machine.is_paused()
        await machine.resume()
        assert not await machine.is_paused()
        stored = json.loads(json.dumps(dict(machine.handle)))
        await machine.detach()
        found = await bench.again().recover(stored, held)
        assert found is not None
        await found.stop()


async def test_a_saved_machine_made_whole_needs_no_other_file(bench: Bench, tmp_path: Path) -> None:
    saved = await saved_machine(bench, tmp_path / "saved")
    await bench.saver.make_whole(saved, bench.spec.memory)
    bench.spec.memory.unlink()
    spec = replace(bench.spec, memory=tmp_path / "clone")
    for _ in range(2):
        spec.memory.unlink(missing_ok=True)
        spec.memory.hardlink_to(saved.memory)
        async with AsyncExitStack() as held:
            machine = await bench.saver.restore(spec, saved, held)
            await machine.resume()
            # What a clone writes is its own: it can be saved again, and the file is as it was.
            await machine.pause()
            again = await machine.save(tmp_path / "again")
            await machine.stop()
            async with AsyncExitStack() as held_again:
                second = await bench.saver.restore(spec, again, held_again)
                await second.resume()
        shutil.rmtree(again.folder)


@pytest.mark.parametrize("what", ["device", "pages"])
@pytest.mark.parametrize("how", ["missing", "cut", "other"])
async def test_a_state_that_is_not_whole_is_refused(
    bench: Bench, tmp_path: Path, what: str, how: str
) -> None:
    saved = await saved_machine(bench, tmp_path / "saved")
    file = saved.folder / what
    if how == "missing" and what == "device":
        file.unlink()
    elif how == "other":
        file.write_bytes(b"x" * 100)
    else:
        os.truncate(file, file.stat().st_size // 2)
    async with AsyncExitStack() as held:
        with pytest.raises(ConflictError, match=r"sav|restore|memory"):
            await bench.saver.restore(bench.spec, saved, held)
    assert not await bench.left()


async def test_a_save_that_fails_leaves_a_machine_that_can_go_on(
    bench: Bench, tmp_path: Path
) -> None:
    async with AsyncExitStack() as held:
        machine = await bench.saver.start(bench.spec, held)
        await until_it_speaks(bench, machine)
        await machine.pause()
        if isinstance(bench.driver, FakeDriver):
            bench.driver.conduct.has_room_to_save = False
            folder = tmp_path / "full"
        else:
            full = tmp_path / "small"
            full.mkdir()
            mount("tmpfs", full, "size=64k")
            held.callback(subprocess.run, ["umount", str(full)], check=True)
            folder = full / "saved"
        with pytest.raises(NoCapacityError, match="disk is full"):
            await machine.save(folder)
        await machine.resume()
        assert not await machine.is_paused()


async def test_a_disk_grows_under_a_running_machine(bench: Bench) -> None:
    async with AsyncExitStack() as held:
        machine = await bench.saver.start(bench.spec, held)
        await machine.grow_disk(2048)
        if bench.driver.name != "fake":
            assert bench.spec.disk.stat().st_size == 2048 * 2**20
