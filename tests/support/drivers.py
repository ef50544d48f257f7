"""Drivers with what one machine needs, for the examinations that they pass."""

import asyncio
import os
import signal
import stat
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandyard.server.drivers.contract import (
    Driver,
    Machine,
    MachineSpec,
    Place,
    Saved,
    SavingDriver,
    Verdict,
)
from sandyard.server.drivers.firecracker.jail import remove_groups
from sandyard.server.drivers.kvm import can_open
from sandyard.server.drivers.processes import uids_at_work
from sandyard.server.drivers.qemu import QemuDriver
from sandyard.server.fakes.driver import FakeDriver, FakeHost
from sandyard.server.node.host.disks import Ext4Disks
from sandyard.server.node.host.identity import give_back_identity, take_identity
from sandyard.server.node.host.network import Slots, host_routes, remove_host_rules
from sandyard.server.tasks import Crew
from tests.support.firecracker import firecracker_driver, guests_of
from tests.support.images import minimal_image

_BOOTS = Verdict(True, "")
_SLOW = 2.0


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
    pace: float = 1.0
    """How many times longer than elsewhere a guest takes to do anything."""
    slots: Slots | None = None
    """The places of real machines."""

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
        "sandbox-abcdefghijkl", 1, 128, tmp_path, tmp_path, (tmp_path,), tmp_path / "disk",
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


async def kvm_bench(tmp_path: Path, held: AsyncExitStack) -> Bench:
    return await _bench_with_kvm(
        "qemu-kvm", tmp_path, held, lambda: QemuDriver(accel="kvm", mounts=None)
    )


def group_of(tmp_path: Path) -> str:
    """Return the control group of a test's jailed machines."""
    return f"syd-{tmp_path.name}"


async def firecracker_bench(tmp_path: Path, held: AsyncExitStack) -> Bench:
    group = group_of(tmp_path)
    held.callback(remove_groups, group)
    return await _bench_with_kvm(
        "firecracker", tmp_path, held, lambda: firecracker_driver(tmp_path / "kernels", group)
    )


async def _bench_with_kvm(
    name: str, tmp_path: Path, held: AsyncExitStack, again: Callable[[], Driver]
) -> Bench:
    guests = await asyncio.to_thread(guests_of, name)
    bench = await real_bench(tmp_path, held, again, kernel=guests.kernel)
    bench.verdict, bench.pace = guests.verdict, guests.pace
    return bench


async def until_it_speaks(bench: Bench, machine: Machine, *, matters: bool = False) -> None:
    """Return once the guest has printed something, or at once where none can.

    Where guests are slow they are not waited for unless it matters: how far one has come when it is
    saved or killed is as good as any other moment.
    """
    speaks = bench.verdict.is_usable and (matters or bench.pace < _SLOW)
    async with asyncio.timeout(60 * bench.pace):
        while speaks and not await machine.console():
            await asyncio.sleep(0.05)


async def real_bench(
    tmp_path: Path,
    held: AsyncExitStack,
    again: Callable[[], Driver],
    *,
    kernel: Path | None = None,
) -> Bench:
    home = tmp_path / "home"
    image = minimal_image(kernel)
    identity = take_identity(home, routes=await host_routes())
    held.callback(give_back_identity, home)
    slots = Slots(identity, home=home)
    crew = await held.enter_async_context(Crew())
    await slots.open(in_use=[], crew=crew)
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
        "sandbox-abcdefghijkl", 1, 256, image.kernel, image.initrd, image.roots, disk,
        tmp_path / "memory", run, place, "t" * 64, has_acpi=image.has_acpi,
        arguments=image.arguments,
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

    return Bench(again(), again, spec, kill, left, is_behind, slots=slots)


NEEDS_KVM = pytest.mark.skipif(not can_open(), reason="NOT RUN: /dev/kvm is not here")
BENCHES = {
    "fake": fake_bench,
    "qemu": qemu_bench,
    "qemu-kvm": kvm_bench,
    "firecracker": firecracker_bench,
}


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


def mount(kind: str, where: Path, options: str) -> None:
    subprocess.run(["mount", "-t", kind, "-o", options, kind, str(where)], check=True)
