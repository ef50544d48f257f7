"""What Firecracker alone has to pass, with the real binaries: its jail, and each thing refused."""

import os
import re
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.drivers import NEEDS_KVM, firecracker_bench, group_of, saved_machine
from tests.support.firecracker import firecracker_binaries

from sandyard.server.core.errors import ConflictError, SandyardError, UnavailableError
from sandyard.server.drivers.contract import ProbeSpec
from sandyard.server.drivers.firecracker import FirecrackerDriver, jail
from sandyard.server.drivers.firecracker.api import Api
from sandyard.server.drivers.namespaces import path_of
from sandyard.server.drivers.processes import kill_all_of


@pytest.mark.machine
@NEEDS_KVM
async def test_firecracker_sees_its_jail_and_nothing_else(tmp_path: Path) -> None:
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        async with AsyncExitStack() as inner:
            machine = await bench.driver.start(bench.spec, inner)
            root = Path(f"/proc/{machine.pid}/root")
            assert {one.name for one in root.iterdir()} == {
                "base", "dev", "disk", "firecracker", "firecracker.pid", "root", "run",
            }  # fmt: skip
            own, hosts = (os.stat(f"/proc/{one}/ns/pid") for one in (machine.pid, "self"))
            assert own.st_ino != hosts.st_ino
            assert groups_of(tmp_path)
        assert not groups_of(tmp_path)


def groups_of(tmp_path: Path) -> list[Path]:
    """Return the control groups of the jailed machines of one test."""
    parents = [one for one in jail.groups(group_of(tmp_path)) if one.is_dir()]
    return [one for parent in parents for one in parent.iterdir() if one.is_dir()]


@pytest.mark.machine
@NEEDS_KVM
async def test_firecracker_killed_at_any_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process dies before each request in turn: the start fails in words, and nothing stays."""
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        real = Api._call
        for step in range(8):
            left = [step]

            async def call(self: Api, *args: Any, left: list[int] = left, **more: Any) -> Any:
                if left[0] == 0:
                    await kill_all_of(bench.spec.place.uid, path_of(bench.spec.place.netns))
                left[0] -= 1
                return await real(self, *args, **more)

            async with AsyncExitStack() as inner:
                with monkeypatch.context() as changed:
                    changed.setattr(Api, "_call", call)
                    with pytest.raises(SandyardError, match="cannot start"):
                        await bench.driver.start(bench.spec, inner)
                assert left[0] < 0
            assert not await bench.left()
            assert not groups_of(tmp_path)
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
        driver = FirecrackerDriver(
            cache=tmp_path, group="syd-none", binary=str(binary), jailer=str(jailer)
        )
        with pytest.raises(UnavailableError, match=match):
            await driver.version()
        verdict = await driver.probe(ProbeSpec(tmp_path, tmp_path, tmp_path, limit_s=20))
        assert not verdict.is_usable


@pytest.mark.machine
@NEEDS_KVM
async def test_firecracker_killed_at_any_step_of_a_save_or_restore_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks gets an error, the state saved before loads as ever, and nothing stays."""
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        uid, netns = bench.spec.place.uid, path_of(bench.spec.place.netns)
        real = Api._call

        def killing(step: int) -> Callable[..., Any]:
            left = [step]

            async def call(self: Api, *args: Any, **more: Any) -> Any:
                if left[0] == 0:
                    await kill_all_of(uid, netns)
                left[0] -= 1
                return await real(self, *args, **more)

            return call

        for step in range(2):  # hold still, save
            async with AsyncExitStack() as inner:
                machine = await bench.saver.start(bench.spec, inner)
                with monkeypatch.context() as changed:
                    changed.setattr(Api, "_call", killing(step))
                    with pytest.raises(SandyardError, match="cannot reach Firecracker"):
                        await machine.pause()
                        await machine.save(tmp_path / f"broken-off-{step}")
                assert (await machine.wait()).code == "machine_died"
            assert not await bench.left()
        saved = await saved_machine(bench, tmp_path / "saved")
        for step in range(2):  # load, go on
            async with AsyncExitStack() as inner:
                with monkeypatch.context() as changed:
                    changed.setattr(Api, "_call", killing(step))
                    with pytest.raises(SandyardError, match="cannot reach Firecracker") as caught:
                        machine = await bench.saver.restore(bench.spec, saved, inner)
                        await machine.resume()
                # What was not at fault is not called damaged.
                assert not isinstance(caught.value, ConflictError)
            assert not await bench.left()
            assert not groups_of(tmp_path)
        async with AsyncExitStack() as inner:
            machine = await bench.saver.restore(bench.spec, saved, inner)
            await machine.resume()


@pytest.mark.machine
@NEEDS_KVM
async def test_a_state_of_another_firecracker_is_refused(tmp_path: Path) -> None:
    """Its version differs and its checksum is right, as another release would have written it."""
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        saved = await saved_machine(bench, tmp_path / "saved")
        state = saved.folder / "device"
        written = state.read_bytes()
        at = written.index(b".", 8) - 1  # after the magic number: the version, as text
        assert re.match(rb"\d\.\d\.\d", written[at:])
        other = written[:at] + b"9" + written[at + 1 : -8]
        assert crc64(written[:-8]) == int.from_bytes(written[-8:], "little")
        state.chmod(0o600)
        state.write_bytes(other + crc64(other).to_bytes(8, "little"))
        async with AsyncExitStack() as inner:
            with pytest.raises(ConflictError, match=r"(?i)version"):
                await bench.saver.restore(bench.spec, saved, inner)
        assert not await bench.left()


def crc64(data: bytes) -> int:
    """Return the checksum at the end of a state: CRC-64/Jones, reflected, without inversion."""
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x95AC9329AC4BC9B5 if value & 1 else 0)
        table.append(value)
    crc = 0
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


@pytest.mark.machine
@NEEDS_KVM
async def test_a_machine_whose_socket_is_gone_is_ended_not_left(tmp_path: Path) -> None:
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        first = AsyncExitStack()
        machine = await bench.saver.start(bench.spec, first)
        (bench.spec.folder / "api.sock").unlink()
        stored = dict(machine.handle)
        first.pop_all()
        await machine.detach()
        async with AsyncExitStack() as inner:
            assert await bench.again().recover(stored, inner) is None
        assert not await bench.left()
        assert not groups_of(tmp_path)


@pytest.mark.machine
@NEEDS_KVM
async def test_a_thing_asked_in_a_wrong_state_is_refused_in_words(tmp_path: Path) -> None:
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        async with AsyncExitStack() as inner:
            machine = await bench.saver.start(bench.spec, inner)
            with pytest.raises(SandyardError, match="Firecracker refused PUT /snapshot/create"):
                await machine.save(tmp_path / "moving")
            await machine.pause()
            await machine.pause()  # to hold still what stands still is nothing
            assert await machine.is_paused()


@pytest.mark.machine
@NEEDS_KVM
async def test_groups_that_cannot_be_used_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        wrong = ["--cgroup-version", "1", "--cgroup", "pids.no_such_file=64"]
        monkeypatch.setattr(jail, "cgroup_arguments", lambda _: wrong)
        for _ in range(2):
            async with AsyncExitStack() as inner:
                machine = await bench.driver.start(bench.spec, inner)
                assert machine.pid > 0
            assert not await bench.left()
        assert (
            len([one for one in caplog.records if "cannot make control groups" in one.message]) == 1
        )


def test_groups_of_the_dead_are_swept_and_the_young_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jail, "groups", lambda name: (tmp_path, tmp_path / name))
    for name, age in (("old", 100), ("young", 0), ("used", 100)):
        (tmp_path / name).mkdir()
        if name == "used":
            (tmp_path / name / "task").touch()
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    jail.sweep_groups("not-here")
    assert {one.name for one in tmp_path.iterdir()} == {"young", "used"}


@pytest.mark.machine
@NEEDS_KVM
async def test_two_hundred_machines_leave_nothing(tmp_path: Path) -> None:
    """Started and killed in turn: no process, jail, control group, descriptor or pipe stays."""
    async with AsyncExitStack() as held:
        bench = await firecracker_bench(tmp_path, held)
        descriptors = 0
        for cycle in range(200):
            async with AsyncExitStack() as inner:
                await bench.driver.start(bench.spec, inner)
            assert not groups_of(tmp_path)
            if cycle == 0:
                descriptors = len(os.listdir("/proc/self/fd"))
        assert not await bench.left()
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert {one.name for one in bench.spec.folder.iterdir()} <= {
            "jail", "api.sock", "console", "log",
        }  # fmt: skip
        assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
