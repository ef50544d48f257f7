"""Golden machine, clones and pauses by hand: what Sandyard's are judged against.

    .venv/bin/python -m bench.raw_clones [clones]

Boots one machine on a shared memory file, saves it, and starts clones that map the file privately:
restore → first command, a warm clone's command, and three ways to pause one with about 30 MiB dirty
(by its private pages; by QEMU's mapped-ram migration; on a memory file of its own).
"""

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.images import minimal_image

from bench import raw_qemu
from bench.raw_qemu import NETNS, TOKEN, enter, exchange, exec_true, sh
from sandyard.server.drivers.initrd import add_token
from sandyard.server.drivers.qemu.command import EMULATED_CPU
from sandyard.server.drivers.qemu.tsc import measure_khz

TAP = "t0"
SIZE_MIB = 528
PAGE = 4096
DIRTY = "head -c 30000000 /dev/urandom > /dev/shm/dirty"


@functools.cache
def rate() -> int:
    return measure_khz()


class Qmp:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        until = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError):
                self.socket.connect(str(path))
                break
            assert time.monotonic() < until
            time.sleep(0.002)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: object) -> object:
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer or "error" in answer:
                assert "error" not in answer, answer
                return answer["return"]

    def until_migrated(self) -> None:
        while True:
            status = self.call("query-migrate")["status"]  # type: ignore[index]
            if status == "completed":
                return
            assert status != "failed"
            time.sleep(0.002)

    def capabilities(self, *names: str) -> None:
        self.call(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in names],
        )


class Machine:
    def __init__(
        self, work: Path, disk: Path, memory: Path, *, shared: bool, waits: str = ""
    ) -> None:
        image, self.work = minimal_image(), work
        qmp = work / f"qmp{time.monotonic_ns()}"
        how = "share=on" if shared else "share=off,readonly=on,rom=off"
        self.process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                "-M", "microvm,acpi=on,rtc=on,suppress-vmdesc=on,memory-backend=m",
                "-accel", "tcg,tb-size=128,thread=multi", "-cpu", EMULATED_CPU,
                "-m", f"{SIZE_MIB}M",
                "-object", f"memory-backend-file,id=m,size={SIZE_MIB}M,mem-path={memory},{how}",
                "-smp", "1", "-kernel", f"{image.folder}/vmlinuz", "-initrd", f"{work}/initrd",
                "-append", "console=ttyS0 reboot=t panic=-1 quiet loglevel=3 tsc=reliable "
                f"tsc_early_khz={rate()} cryptomgr.notests initcall_blacklist=jent_mod_init",
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-serial", "null",
                *(
                    word
                    for one in image.roots
                    for word in (
                        "-drive", f"id={one.stem},file={one},format=raw,if=none,readonly=on",
                        "-device", f"virtio-blk-device,drive={one.stem}",
                    )
                ),
                "-drive", f"id=b,file={disk},format=raw,if=none",
                "-device", "virtio-blk-device,drive=b",
                "-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no",
                "-device", "virtio-net-device,netdev=n,mac=02:73:79:00:00:02",
                "-qmp", f"unix:{qmp},server=on,wait=off",
                *(["-S", "-incoming", "defer"] if waits else []),
                *(["-global", "migration.send-configuration=off"] if waits == "pages" else []),
            ]
        )  # fmt: skip
        self.qmp = Qmp(qmp)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_for_agent() -> None:
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("172.16.0.2", 9111), 0.2):
            return
        time.sleep(0.002)


def run(command: str) -> None:
    said = exchange(
        "exec", command=command, timeoutMs=60_000, cwd="/", env={}, user="root", stdin=False
    )
    assert b'"exitCode": 0' in said, said


def private_pages(machine: Machine, memory: Path) -> Iterator[tuple[int, int]]:
    """Yield address and length of each stretch of pages that a clone has written."""
    maps = Path(f"/proc/{machine.process.pid}/maps").read_text()
    line = next(one for one in maps.splitlines() if one.endswith(str(memory)))
    start, end = (int(one, 16) for one in line.split()[0].split("-"))
    with open(f"/proc/{machine.process.pid}/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), (end - start) // PAGE * 8, start // PAGE * 8)
    flags = bytes(1 if one & 0xC0 and not one & 0x20 else 0 for one in range(256))
    for found in re.finditer(b"\x01+", entries[7::8].translate(flags)):
        yield start + found.start() * PAGE, (found.end() - found.start()) * PAGE


def save_pages(machine: Machine, memory: Path, target: Path) -> list[tuple[int, int]]:
    runs = list(private_pages(machine, memory))
    with (
        open(f"/proc/{machine.process.pid}/mem", "rb", buffering=0) as source,
        target.open("wb", buffering=0) as file,
    ):
        for start, length in runs:
            for offset in range(0, length, 2**20):
                file.write(os.pread(source.fileno(), min(2**20, length - offset), start + offset))
        os.fsync(file.fileno())
    return runs


def load_pages(machine: Machine, memory: Path, runs: list[tuple[int, int]], source: Path) -> None:
    before = next(
        one for one in Path(f"/proc/{machine.process.pid}/maps").read_text().splitlines()
        if one.endswith(str(memory))
    )  # fmt: skip
    base, first = int(before.split("-")[0], 16), runs[0][0]
    del first
    with (
        open(f"/proc/{machine.process.pid}/mem", "r+b", buffering=0) as target,
        source.open("rb") as file,
    ):
        for offset, length in runs:
            os.pwrite(target.fileno(), file.read(length), base + offset)


def relative(machine: Machine, memory: Path, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    line = next(
        one for one in Path(f"/proc/{machine.process.pid}/maps").read_text().splitlines()
        if one.endswith(str(memory))
    )  # fmt: skip
    base = int(line.split("-")[0], 16)
    return [(start - base, length) for start, length in runs]


def golden(work: Path) -> tuple[Path, Path, Path]:
    disk, memory, state = work / "golden.disk", work / "golden.memory", work / "golden.state"
    sh(f"mke2fs -q -t ext4 -m 0 -J size=16 {disk} 1024M; truncate -s {SIZE_MIB}M {memory}")
    machine = Machine(work, disk, memory, shared=True)
    wait_for_agent()
    for _ in range(5):
        exec_true()
    machine.qmp.call("stop")
    machine.qmp.capabilities("x-ignore-shared")
    machine.qmp.call("migrate", uri=f"file:{state}")
    machine.qmp.until_migrated()
    machine.end()
    return disk, memory, state


def clone(work: Path, saved: tuple[Path, Path, Path]) -> tuple[Machine, float]:
    """Return a running clone, and when it was begun."""
    started = time.perf_counter()
    disk = work / f"disk{time.monotonic_ns()}"
    sh(f"cp --sparse=always {saved[0]} {disk}")
    machine = Machine(work, disk, saved[1], shared=False, waits="shared")
    machine.qmp.capabilities("x-ignore-shared")
    machine.qmp.call("migrate-incoming", uri=f"file:{saved[2]}")
    machine.qmp.until_migrated()
    machine.qmp.call("cont")
    wait_for_agent()
    return machine, started


def pause_ways(work: Path, saved: tuple[Path, Path, Path], times: int) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {}

    def note(name: str, started: float) -> None:
        took.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(times):
        machine, _ = clone(work, saved)
        run(DIRTY)
        started = time.perf_counter()
        machine.qmp.call("stop")
        state, pages = work / "paused.state", work / "paused.pages"
        machine.qmp.call("xen-save-devices-state", filename=str(state), live=False)
        runs = relative(machine, saved[1], save_pages(machine, saved[1], pages))
        note("pause by private pages", started)
        took.setdefault("private MiB", []).append(sum(one for _, one in runs) / 2**20)
        disk = max(work.glob("disk*"), key=lambda path: path.stat().st_mtime_ns)
        machine.end()
        started = time.perf_counter()
        machine = Machine(work, disk, saved[1], shared=False, waits="pages")
        load_pages(machine, saved[1], runs, pages)
        machine.qmp.call("migrate-incoming", uri=f"file:{state}")
        machine.qmp.until_migrated()
        machine.qmp.call("cont")
        exec_true()
        note("resume by private pages → exec", started)
        machine.end()
        # All of the memory, by QEMU itself.
        machine, _ = clone(work, saved)
        run(DIRTY)
        started = time.perf_counter()
        machine.qmp.call("stop")
        machine.qmp.call(
            "migrate-set-capabilities",
            capabilities=[
                {"capability": "x-ignore-shared", "state": False},
                {"capability": "mapped-ram", "state": True},
                {"capability": "multifd", "state": True},
            ],
        )
        machine.qmp.call("migrate", uri=f"file:{work}/mapped")
        machine.qmp.until_migrated()
        sh(f"sync {work}/mapped")
        note("pause by mapped-ram", started)
        machine.end()
        # A memory file of its own, shared with the process: it is written as the guest runs.
        started = time.perf_counter()
        own, disk = work / "own.memory", work / "own.disk"
        sh(f"cp --sparse=always {saved[1]} {own}; cp --sparse=always {saved[0]} {disk}")
        note("a memory file of one's own: its copy", started)
        machine = Machine(work, disk, own, shared=True, waits="shared")
        machine.qmp.capabilities("x-ignore-shared")
        machine.qmp.call("migrate-incoming", uri=f"file:{saved[2]}")
        machine.qmp.until_migrated()
        machine.qmp.call("cont")
        wait_for_agent()
        run(DIRTY)
        started = time.perf_counter()
        machine.qmp.call("stop")
        machine.qmp.call("migrate", uri=f"file:{work}/own.state")
        machine.qmp.until_migrated()
        sh(f"sync {own} {work}/own.state")
        note("pause on a memory file of one's own, synced", started)
        machine.end()
        for path in (own, disk, work / "mapped"):
            path.unlink()
    return took


def pss_mib(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1]) / 1024  # type: ignore[index]


def measure(clones: int) -> dict[str, list[float]]:
    image = minimal_image()
    result: dict[str, list[float]] = {}
    sh(f"ip netns del {NETNS} || true; ip netns add {NETNS}; ip -n {NETNS} link set lo up")
    enter()
    work = Path(tempfile.mkdtemp(prefix="raw-", dir="/tmp"))
    try:
        sh(f"ip tuntap add {TAP} mode tap; ip link set {TAP} address 02:73:79:00:00:01; "
           f"ip addr add 172.16.0.1/30 dev {TAP}; ip link set {TAP} up")  # fmt: skip
        (work / "initrd").write_bytes(add_token((image.folder / "initrd").read_bytes(), TOKEN))
        saved = golden(work)
        for _ in range(clones):
            machine, started = clone(work, saved)
            exec_true()
            result.setdefault("restore → first exec", []).append(time.perf_counter() - started)
            exec_true()
            exec_true()
            result.setdefault("exec in a warm clone", []).append(exec_true())
            machine.end()
        result |= pause_ways(work, saved, max(2, clones // 3))
    finally:
        shutil.rmtree(work)
        sh(f"ip netns del {NETNS}")
    return result


if __name__ == "__main__":
    raw_qemu.TOKEN = TOKEN
    json.dump(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 6), sys.stdout)
