"""The examination every driver passes: the fake, and QEMU on real machines."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.firecracker import firecracker_binaries
from tests.support.images import minimal_image

from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    NoCapacityError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.drivers.contract import (
    Driver,
    Machine,
    MachineSpec,
    Place,
    Saved,
    SavingDriver,
    Verdict,
)
from sandyard.server.drivers.fake import FakeDriver, FakeHost
from sandyard.server.drivers.firecracker import FirecrackerDriver, has_kvm
from sandyard.server.drivers.firecracker.api import Api
from sandyard.server.drivers.processes import kill_all_of, uids_at_work
from sandyard.server.drivers.qemu import QemuDriver
from sandyard.server.drivers.qemu.monitor import Monitor
from sandyard.server.node.disks import Ext4Disks
from sandyard.server.node.identity import give_back_identity, take_identity
from sandyard.server.node.network import Slots, host_routes, remove_host_rules

_BOOTS = Verdict(True, "")


@dataclass
class Bench:
    """A driver with what it needs for one machine, and a look at what it left."""

    driver: Driver
    again: Callable[[], Driver]
    spec: MachineSpec
    kill: Callable[[int], None]
    left: Callable[[], Awaitable[object]]
    is_behind: Callable[[int], bool]
    verdict: Verdict = _BOOTS
    """Where no guest comes up, as under a KVM that does not really work, none can speak either."""

    @property
    def saver(self) -> SavingDriver:
        """The driver, as one that saves machines."""
        assert self.driver.capabilities.saves
        return self.driver  # type: ignore[return-value]  # as it says of itself


async def fake_bench(tmp_path: Path, held: AsyncExitStack) -> Bench:
    host = FakeHost()
    place = Place(0, "none", "tap0", "02:00:00:00:00:02", "fake", os.geteuid())
    (tmp_path / "run").mkdir()
    spec = MachineSpec(
        "sandbox-abcdefghijkl", 1, 128, tmp_path, tmp_path, tmp_path, tmp_path / "disk",
        tmp_path / "memory", tmp_path / "run", place, "t" * 64,
    )  # fmt: skip

    async def left() -> object:
        return list(host.machines)

    return Bench(
        FakeDriver(host),
        lambda: FakeDriver(host),
        spec,
        lambda pid: host.machines[pid].die(),
        left,
        lambda pid: host.machines[pid].is_behind,
    )


async def qemu_bench(tmp_path: Path, held: AsyncExitStack) -> Bench:
    return await real_bench(tmp_path, held, lambda: QemuDriver(accel="tcg"))


async def firecracker_bench(tmp_path: Path, held: AsyncExitStack) -> Bench:
    binaries = firecracker_binaries()

    def driver() -> FirecrackerDriver:
        return FirecrackerDriver(
            cache=tmp_path / "kernels",
            binary=str(binaries / "firecracker"),
            jailer=str(binaries / "jailer"),
            # The first lines of the kernel, also where it does not come further than those.
            arguments="earlyprintk=ttyS0 loglevel=7 clearcpuid=cx16",
        )

    bench = await real_bench(tmp_path, held, driver)
    if not _VERDICTS:
        scratch = tmp_path / "first-probe"
        scratch.mkdir()
        _VERDICTS.append(
            await driver().probe(
                kernel=bench.spec.kernel, initrd=bench.spec.initrd, scratch=scratch
            )
        )
    bench.verdict = _VERDICTS[0]
    return bench


_VERDICTS: list[Verdict] = []


async def until_it_speaks(bench: Bench, machine: Machine) -> None:
    """Return once the guest has printed something, or at once where none can."""
    async with asyncio.timeout(30):
        while bench.verdict.is_usable and not await machine.console():
            await asyncio.sleep(0.05)


async def real_bench(tmp_path: Path, held: AsyncExitStack, again: Callable[[], Driver]) -> Bench:
    home = tmp_path / "home"
    image = minimal_image()
    identity = take_identity(home, routes=await host_routes())
    held.callback(give_back_identity, home)
    slots = Slots(identity)
    tasks = await held.enter_async_context(asyncio.TaskGroup())
    await slots.open(in_use=[], tasks=tasks)
    held.push_async_callback(remove_host_rules, identity)
    held.push_async_callback(slots.close)
    place = await slots.take()
    held.push_async_callback(slots.give_back, place)
    # As in a node's home: others may pass through, none may look in.
    for folder in [tmp_path, *list(tmp_path.parents)[:2]]:
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, place.uid, place.uid)
    disk = tmp_path / "disk.ext4"
    await Ext4Disks().make(disk, size_mib=1024, uid=place.uid)
    spec = MachineSpec(
        "sandbox-abcdefghijkl", 1, 256, image.kernel, image.initrd, image.base, disk,
        tmp_path / "memory", run, place, "t" * 64,
    )  # fmt: skip

    async def left() -> object:
        return uids_at_work(identity.uids)

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def is_behind(pid: int) -> bool:
        threads = [int(one.name) for one in Path(f"/proc/{pid}/task").iterdir()]
        values = {os.getpriority(os.PRIO_PROCESS, one) for one in threads}
        assert len(values) == 1, "one thread gives way, another does not"
        return values.pop() > os.getpriority(os.PRIO_PROCESS, 0)

    return Bench(again(), again, spec, kill, left, is_behind)


NEEDS_KVM = pytest.mark.skipif(not has_kvm(), reason="NOT RUN: /dev/kvm is not here")
BENCHES = {"fake": fake_bench, "qemu": qemu_bench, "firecracker": firecracker_bench}


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
        await until_it_speaks(bench, machine)
        assert await machine.stall() is None
        await machine.stop()
        await machine.stop()
        assert not await bench.left()


async def test_a_machine_started_ahead_gives_way_until_it_comes_forward(bench: Bench) -> None:
    async with AsyncExitStack() as held:
        machine = await bench.driver.start(replace(bench.spec, is_ahead=True), held)
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


@pytest.mark.parametrize("turns", [1, 2, 3, 400])
async def test_a_start_broken_off_at_any_moment_leaves_nothing(bench: Bench, turns: int) -> None:
    async with AsyncExitStack() as held:
        starting = asyncio.create_task(bench.driver.start(bench.spec, held))
        for _ in range(turns):
            await asyncio.sleep(0 if turns < 10 else 0.0001)
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
    spec = replace(bench.spec, base=Path("/nowhere/base.ext4"))
    async with AsyncExitStack() as held:
        with pytest.raises(SandyardError, match="cannot start"):
            await bench.driver.start(spec, held)
    async with asyncio.timeout(5):  # it has given up, and may be about to end
        while await bench.left():
            await asyncio.sleep(0.01)


async def test_the_probe_gives_a_verdict_and_never_raises(bench: Bench, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    verdict = await bench.driver.probe(
        kernel=bench.spec.kernel, initrd=bench.spec.initrd, scratch=scratch
    )
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


async def saved_machine(bench: Bench, folder: Path) -> Saved:
    """Start a machine, save it after a while, and end it."""
    async with AsyncExitStack() as held:
        machine = await bench.saver.start(bench.spec, held)
        await until_it_speaks(bench, machine)
        await machine.pause()
        assert await machine.is_paused()
        saved = await machine.save(folder)
        assert await machine.is_paused()
        await machine.resume()
        assert not await machine.is_paused()
        await machine.pause()
    assert not await bench.left()
    return saved


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


def mount(kind: str, where: Path, options: str) -> None:
    subprocess.run(["mount", "-t", kind, "-o", options, kind, str(where)], check=True)


@pytest.mark.machine
async def test_a_monitor_that_is_anothers_is_not_talked_to(tmp_path: Path) -> None:
    """The socket lies in the machine's own folder, which may hold a link to another machine's."""
    async with AsyncExitStack() as held:
        bench = await qemu_bench(tmp_path, held)
        first = AsyncExitStack()
        machine = await bench.driver.start(bench.spec, first)
        stored = dict(machine.handle)
        first.pop_all()
        await machine.detach()
        place = Path(str(stored["qmp"]))
        place.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "o"))
            other.listen()
            place.symlink_to(tmp_path / "o")
            inner = await held.enter_async_context(AsyncExitStack())
            assert await bench.again().recover(stored, inner) is None
        assert not await bench.left()


@pytest.mark.machine
@pytest.mark.parametrize("what", ["pipe", "link", "name", "others"])
async def test_a_state_that_is_no_file_of_the_machines_own_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async with AsyncExitStack() as held:
        bench = await qemu_bench(tmp_path, held)
        secret = tmp_path / "secret"
        secret.write_text("not the machine's")

        async def call(self: Monitor, command: str, arguments: Mapping[str, object]) -> None:
            path = Path(str(arguments["filename"]))
            match what:
                case "pipe":
                    os.mkfifo(path)
                case "link":
                    path.symlink_to(secret)
                case "name":
                    path.hardlink_to(secret)
                case _:
                    path.write_text("root's")

        async with AsyncExitStack() as inner:
            machine = await bench.saver.start(bench.spec, inner)
            await machine.pause()
            with monkeypatch.context() as changed:
                changed.setattr(Monitor, "call", call)
                with pytest.raises(SandyardError, match="cannot save"):
                    async with asyncio.timeout(10):
                        await machine.save(tmp_path / "saved")
        assert not await bench.left()


@pytest.mark.machine
@NEEDS_KVM
async def test_firecracker_sees_its_jail_and_nothing_else(tmp_path: Path) -> None:
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        async with AsyncExitStack() as inner:
            machine = await bench.driver.start(bench.spec, inner)
            root = Path(f"/proc/{machine.pid}/root")
            assert {one.name for one in root.iterdir()} == {
                "base", "dev", "disk", "firecracker", "firecracker.pid", "run",
            }  # fmt: skip
            own, hosts = (os.stat(f"/proc/{one}/ns/pid") for one in (machine.pid, "self"))
            assert own.st_ino != hosts.st_ino
            assert groups_of(bench.spec.name)
        assert not groups_of(bench.spec.name)


def groups_of(name: str) -> list[Path]:
    """Return the control groups of a jailed machine."""
    return [one for one in Path("/sys/fs/cgroup").glob(f"**/firecracker/{name}") if one.is_dir()]


@pytest.mark.machine
@NEEDS_KVM
async def test_firecracker_killed_at_any_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process dies before each request in turn: the start fails in words, and nothing stays."""
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        real = Api._call
        for step in range(7):
            left = [step]

            async def call(self: Api, *args: Any, left: list[int] = left, **more: Any) -> Any:
                if left[0] == 0:
                    await kill_all_of(bench.spec.place.uid)
                left[0] -= 1
                return await real(self, *args, **more)

            async with AsyncExitStack() as inner:
                with monkeypatch.context() as changed:
                    changed.setattr(Api, "_call", call)
                    with pytest.raises(SandyardError, match="cannot start"):
                        await bench.driver.start(bench.spec, inner)
                assert left[0] < 0
            assert not await bench.left()
            assert not groups_of(bench.spec.name)
        async with AsyncExitStack() as inner:
            await (await bench.driver.start(bench.spec, inner)).stop()


@pytest.mark.machine
@NEEDS_KVM
async def test_firecracker_of_another_version_is_refused(tmp_path: Path) -> None:
    binaries = firecracker_binaries()
    other = tmp_path / "firecracker"
    other.write_text("#!/bin/sh\necho Firecracker v1.7.0\n")
    other.chmod(0o755)
    for binary, jailer, match in (
        (other, binaries / "jailer", "do not belong together"),
        (other, other, "not supported"),
        (tmp_path / "nothing", binaries / "jailer", "not installed"),
    ):
        driver = FirecrackerDriver(cache=tmp_path, binary=str(binary), jailer=str(jailer))
        with pytest.raises(UnavailableError, match=match):
            await driver.version()
        verdict = await driver.probe(kernel=tmp_path, initrd=tmp_path, scratch=tmp_path)
        assert not verdict.is_usable
