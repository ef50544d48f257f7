"""What QEMU alone has to pass: its monitor and its files lie where a guest may come."""

import asyncio
import gc
import os
import socket
import subprocess
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from tests.support.drivers import mount, qemu_bench

from sandyard.server.core.errors import NoCapacityError, SandyardError, UnavailableError
from sandyard.server.drivers.qemu.driver import QemuMachine
from sandyard.server.drivers.qemu.monitor import Monitor
from sandyard.server.tasks import concurrently


class Told:
    """What stands for a monitor whose machine tries again, and shows only later how that went."""

    def __init__(self, *statuses: str) -> None:
        self.statuses = list(statuses)
        self.calls: list[str] = []

    async def status(self) -> str:
        if not self.statuses:
            raise UnavailableError("it does not answer")
        return self.statuses.pop(0)

    async def call(self, command: str) -> None:
        self.calls.append(command)


async def test_a_machine_that_found_the_disk_full_is_told_of_although_it_tries_again() -> None:
    told = Told("io-error", "running")
    process: Any = None
    monitor: Any = told
    machine = QemuMachine(process, monitor, {"uid": 1})
    assert (found := await machine.stall()) is not None
    assert (found.code, told.calls) == ("host_disk_full", ["cont"])
    assert await machine.stall() is None
    assert told.calls == ["cont"]
    # One that is about to be saved is not set going, whatever it stands still for.
    told.statuses = ["io-error", "io-error"]
    await machine.pause()
    assert await machine.stall() is not None
    assert told.calls == ["cont", "stop"]
    await machine.resume()
    assert await machine.stall() is not None
    assert told.calls == ["cont", "stop", "cont", "cont"]
    assert await machine.stall() is None, "whatever keeps it from answering is no full disk"


async def test_a_connection_to_the_monitor_broken_off_at_any_step_is_closed(tmp_path: Path) -> None:
    async def greet_nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            await reader.read()
        writer.close()

    path = tmp_path / "qmp.sock"
    async with await asyncio.start_unix_server(greet_nobody, path):
        for steps in range(20):
            connecting = asyncio.create_task(Monitor.connect(path, pid=os.getpid()))
            for _ in range(steps):
                await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.wait([connecting])
            assert connecting.cancelled()
            del connecting
            gc.collect()  # a socket left open is a warning, which is an error here


@pytest.mark.machine
@pytest.mark.parametrize(
    ("printed", "code"), [("", "machine_died"), ("reboot: Restarting system", "guest_rebooted")]
)
async def test_what_kvm_cannot_go_on_with_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: str
) -> None:
    """No event says so: it is found by looking."""
    async with AsyncExitStack() as held:
        bench = await qemu_bench(tmp_path, held)
        machine = cast("QemuMachine", await bench.driver.start(bench.spec, held))
        status = Monitor.status
        async with asyncio.timeout(60), concurrently(machine.wait()) as ending:
            assert await machine.stall() is None
            assert not ending.done()

            async def broken(monitor: Monitor) -> str:
                await status(monitor)
                return "internal-error"

            monkeypatch.setattr(Monitor, "status", broken)
            machine._console_tail = printed.encode()
            assert await machine.stall() is None
            assert (await ending).code == code


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
async def test_a_disk_so_full_that_qemu_cannot_write_its_state_is_said_to_be_full(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as held:
        bench = await qemu_bench(tmp_path, held)
        async with AsyncExitStack() as inner:
            machine = await bench.saver.start(bench.spec, inner)
            mount("tmpfs", bench.spec.folder, f"size=4k,uid={bench.spec.place.uid}")
            inner.callback(subprocess.run, ["umount", "-l", str(bench.spec.folder)], check=True)
            await machine.pause()
            with pytest.raises(NoCapacityError, match="disk is full"):
                await machine.save(tmp_path / "saved")
            await machine.resume()
