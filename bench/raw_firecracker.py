"""The same steps by hand: one Firecracker, no jailer, its API by plain HTTP.

    .venv/bin/python -m bench.raw_firecracker [rounds]

Prints milliseconds, by hand and through the driver in its jail, turn and turn about: the API
answers, InstanceStart, hold still and save, load in a fresh process. A guest need not come up.
"""

import asyncio
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from tests.support.drivers import firecracker_bench, saved_machine
from tests.support.firecracker import firecracker_binaries

from bench.figures import percentile
from sandyard.server.drivers.firecracker.api import Api
from sandyard.server.drivers.firecracker.jail import Jail

MEMORY_MIB = 256
Figures = dict[str, list[float]]


class Process:
    """One Firecracker and a connection to it; `held` ends it, whatever becomes of the round."""

    def __init__(self, folder: Path, held: ExitStack) -> None:
        self.path = folder / "api.sock"
        self.path.unlink(missing_ok=True)
        self.child = subprocess.Popen(
            [str(firecracker_binaries() / "firecracker"), "--api-sock", str(self.path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        held.callback(self.end)
        self.http = http.client.HTTPConnection("localhost", timeout=30)
        while True:
            self.http.sock = socket.socket(socket.AF_UNIX)
            try:
                self.http.sock.connect(str(self.path))
                break
            except OSError:
                self.http.sock.close()
                time.sleep(0.001)
        self.call("GET", "/")

    def call(self, method: str, path: str, body: object = None) -> None:
        data = None if body is None else json.dumps(body)
        self.http.request(method, path, data, {"Content-Type": "application/json"})
        answer = self.http.getresponse()
        said = answer.read()
        assert answer.status < 300, said

    def end(self) -> None:
        self.http.close()
        self.child.kill()
        self.child.wait()


def by_hand(
    folder: Path, kernel: Path, initrd: Path, roots: Sequence[Path], figures: Figures
) -> None:
    with ExitStack() as held:
        _by_hand(folder, kernel, initrd, roots, figures, held)


def _by_hand(
    folder: Path,
    kernel: Path,
    initrd: Path,
    roots: Sequence[Path],
    figures: Figures,
    held: ExitStack,
) -> None:
    def note(name: str, started: float) -> None:
        figures[f"{name}, by hand"].append(time.perf_counter() - started)

    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(2**30)
    started = time.perf_counter()
    one = Process(folder, held)
    note("API answers", started)
    call = one.call
    call("PUT", "/machine-config", {
        "vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "track_dirty_pages": True,
    })  # fmt: skip
    call("PUT", "/boot-source", {
        "kernel_image_path": str(kernel), "initrd_path": str(initrd), "boot_args": "quiet",
    })  # fmt: skip
    drives = [*((one.stem, one, True) for one in roots), ("disk", disk, False)]
    for name, path, is_read_only in drives:
        call("PUT", f"/drives/{name}", {
            "drive_id": name, "path_on_host": str(path), "is_root_device": False,
            "is_read_only": is_read_only, "cache_type": "Writeback",
        })  # fmt: skip
    call("PUT", "/entropy", {})
    started = time.perf_counter()
    call("PUT", "/actions", {"action_type": "InstanceStart"})
    note("InstanceStart", started)
    state, memory = folder / "state", folder / "memory"
    started = time.perf_counter()
    call("PATCH", "/vm", {"state": "Paused"})
    call("PUT", "/snapshot/create", {
        "snapshot_type": "Diff", "snapshot_path": str(state), "mem_file_path": str(memory),
    })  # fmt: skip
    for path in (state, memory, disk):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    note("hold still and save", started)
    one.end()
    started = time.perf_counter()
    two = Process(folder, held)
    two.call("PUT", "/snapshot/load", {
        "snapshot_path": str(state), "enable_diff_snapshots": True, "resume_vm": False,
        "mem_backend": {"backend_type": "File", "backend_path": str(memory)},
    })  # fmt: skip
    note("load in a fresh process", started)
    two.end()
    for path in (state, memory, disk):
        path.unlink()


async def ours(folder: Path, held: AsyncExitStack, figures: Figures, rounds: int) -> None:
    def note(name: str, started: float) -> None:
        figures[f"{name}, ours"].append(time.perf_counter() - started)

    bench = await firecracker_bench(folder, held)
    launch, start = Jail.launch, Api.start

    async def timed_launch(self: Jail, *args: str, **more: str | None) -> int:
        started = time.perf_counter()
        pid = await launch(self, *args, **more)  # type: ignore[arg-type]
        note("API answers", started)
        return pid

    async def timed_start(self: Api) -> None:
        started = time.perf_counter()
        await start(self)
        note("InstanceStart", started)

    Jail.launch, Api.start = timed_launch, timed_start  # type: ignore[method-assign]
    raw = folder / "raw"
    raw.mkdir()
    for _ in range(rounds):
        async with AsyncExitStack() as inner:
            started = time.perf_counter()
            machine = await bench.saver.start(bench.spec, inner)
            note("the whole start", started)
            started = time.perf_counter()
            await machine.pause()
            await machine.save(folder / "saved")
            note("hold still and save", started)
        shutil.rmtree(folder / "saved")
        saved = await saved_machine(bench, folder / "saved")
        async with AsyncExitStack() as inner:
            started = time.perf_counter()
            await bench.saver.restore(bench.spec, saved, inner)
            note("load in a fresh process", started)
        shutil.rmtree(folder / "saved")
        kernel = next((folder / "kernels").iterdir())
        await asyncio.to_thread(by_hand, raw, kernel, bench.spec.initrd, bench.spec.roots, figures)


async def main(rounds: int) -> None:
    figures: Figures = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="sy-", dir="/tmp") as place:
        Path(place).chmod(0o711)
        folder = Path(place) / "b"
        folder.mkdir()
        async with AsyncExitStack() as held:
            await ours(folder, held, figures, rounds)
    for name, values in sorted(figures.items()):
        p50, p99 = percentile(values, 0.5) * 1000, percentile(values, 0.99) * 1000
        print(f"{name:36} {len(values):4} {p50:9.1f} {p99:9.1f}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
