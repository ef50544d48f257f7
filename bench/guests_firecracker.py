"""Guests under Firecracker, ours and by hand, turn and turn about on the same host.

    .venv/bin/python -m bench.guests_firecracker [--rounds 5] [--forks 10] [--idle 20]

By hand: one Firecracker without a jail in a namespace with one tap, its API by plain HTTP, the same
kernel, image and agent. Ours: a real server, over its HTTP API. Where the distribution's kernel
does not come up, the kernel for tests is used; the figures are that kernel's then.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.support.firecracker import environment_of, guests_of
from tests.support.images import CACHE, minimal_image
from tests.support.ports import free_port
from tests.support.server import RealServer, paced, wait_until

from bench.figures import percentile
from bench.raw_firecracker import Process
from bench.raw_qemu import TOKEN, exchange, sh
from sandyard.server.drivers.initrd import add_token
from sandyard.server.drivers.kernels import unpacked_kernel

NETNS, TAP = "bench-fc", "tap0"
MEMORY_MIB = 512 + 16
ARGUMENTS = (
    "console=ttyS0 reboot=k panic=-1 pci=off quiet loglevel=3 i8042.noaux i8042.nomux i8042.dumbkbd"
)
Figures = dict[str, dict[str, list[float]]]


def pss_mib(pid: int) -> float:
    found = re.search(
        r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
    )
    assert found
    return int(found[1]) / 1024


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_percent(pid: int, seconds: float) -> float:
    before = cpu_s(pid)
    time.sleep(seconds)
    return (cpu_s(pid) - before) / seconds * 100


def run(command: str = "true") -> None:
    said = exchange(
        "exec", limit_s=120, command=command, timeoutMs=120_000, cwd="/", env={}, user="root",
        stdin=False,
    )  # fmt: skip
    assert b'"exitCode": 0' in said, said


class ByHand:
    """One machine that was booted and saved, and clones of it, one at a time on the tap."""

    def __init__(self, work: Path, held: contextlib.ExitStack) -> None:
        self.work = work
        self.held = held
        guests = guests_of("firecracker")
        image = minimal_image(guests.kernel)
        kernel = unpacked_kernel(image.kernel, CACHE / "kernels")
        (work / "initrd").write_bytes(add_token(image.initrd.read_bytes(), TOKEN))
        sh(f"mke2fs -q -t ext4 -m 0 {work}/disk 1024M")
        first = Process(work, held)
        first.call("PUT", "/machine-config", {
            "vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "track_dirty_pages": True,
        })  # fmt: skip
        first.call("PUT", "/boot-source", {
            "kernel_image_path": str(kernel), "initrd_path": f"{work}/initrd",
            "boot_args": f"{ARGUMENTS} {image.arguments}",
        })  # fmt: skip
        for name, path, is_read_only in (
            *((one.stem, one, True) for one in image.roots), ("disk", work / "disk", False)
        ):  # fmt: skip
            first.call("PUT", f"/drives/{name}", {
                "drive_id": name, "path_on_host": str(path), "is_root_device": False,
                "is_read_only": is_read_only, "cache_type": "Writeback",
            })  # fmt: skip
        first.call("PUT", "/network-interfaces/net", {
            "iface_id": "net", "host_dev_name": TAP, "guest_mac": "02:73:79:00:00:02",
        })  # fmt: skip
        first.call("PUT", "/actions", {"action_type": "InstanceStart"})
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("172.16.0.2", 9111), 1):
                break
            time.sleep(0.05)
        for _ in range(3):
            run()
        time.sleep(4)
        self.save(first, "golden")
        first.end()

    def save(self, process: Process, name: str) -> None:
        """Hold still, write the difference, and have all of it on the disk."""
        process.call("PATCH", "/vm", {"state": "Paused"})
        process.call("PUT", "/snapshot/create", {
            "snapshot_type": "Diff", "snapshot_path": f"{self.work}/{name}.state",
            "mem_file_path": f"{self.work}/{name}.memory",
        })  # fmt: skip
        for path in (f"{name}.state", f"{name}.memory", "disk"):
            descriptor = os.open(self.work / path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def load(self, name: str, *, tap: str = TAP) -> Process:
        process = Process(self.work, self.held)
        process.call("PUT", "/snapshot/load", {
            "snapshot_path": f"{self.work}/{name}.state", "enable_diff_snapshots": True,
            "resume_vm": True,
            "mem_backend": {"backend_type": "File", "backend_path": f"{self.work}/{name}.memory"},
            "network_overrides": [{"iface_id": "net", "host_dev_name": tap}],
        })  # fmt: skip
        return process

    def round(self, figures: Figures, *, idle_s: float) -> None:
        started = time.perf_counter()
        clone = self.load("golden")
        run()
        figures["restore to first command, ms"]["by hand"].append(time.perf_counter() - started)
        if idle_s:
            figures["memory a clone adds, MiB"]["by hand"].append(pss_mib(clone.child.pid))
            figures["idle CPU of a clone, %"]["by hand"].append(
                idle_percent(clone.child.pid, idle_s)
            )
        (self.work / "paused.memory").unlink(missing_ok=True)
        started = time.perf_counter()
        self.save(clone, "paused")
        clone.end()
        figures["pause, ms"]["by hand"].append(time.perf_counter() - started)
        # What was saved lies over what it began with: in one file, as Firecracker maps one.
        started = time.perf_counter()
        shutil.copy(self.work / "golden.memory", self.work / "joined.memory")
        with (
            open(self.work / "paused.memory", "rb") as over,
            open(self.work / "joined.memory", "r+b") as under,
        ):
            end = 0
            with contextlib.suppress(OSError):
                while True:
                    start = os.lseek(over.fileno(), end, os.SEEK_DATA)
                    end = os.lseek(over.fileno(), start, os.SEEK_HOLE)
                    while start < end:
                        start += os.copy_file_range(
                            over.fileno(), under.fileno(), end - start, start, start
                        )
        (self.work / "joined.state").write_bytes((self.work / "paused.state").read_bytes())
        again = self.load("joined")
        run()
        figures["resume to first command, ms"]["by hand"].append(time.perf_counter() - started)
        again.end()

    def forks(self, figures: Figures, number: int) -> None:
        """So many at once, each held on a tap of its own that leads nowhere."""
        for one in range(number):
            sh(f"ip tuntap add fork{one} mode tap")
        started = time.perf_counter()
        made = []
        for one in range(number):
            shutil.copy(self.work / "disk", self.work / f"disk-{one}")
            made.append(self.load("golden", tap=f"fork{one}"))
        figures[f"fork x{number}, ms"]["by hand"].append(time.perf_counter() - started)
        for each in made:
            each.end()


def ours(server: RealServer, figures: Figures, *, idle_s: float) -> None:
    started = time.perf_counter()
    box = server.create()["id"]
    server.execute(box, "true")
    figures["restore to first command, ms"]["ours"].append(time.perf_counter() - started)
    if idle_s:
        figures["memory a clone adds, MiB"]["ours"].append(pss_mib(server.pid_of(box)))
        figures["idle CPU of a clone, %"]["ours"].append(idle_percent(server.pid_of(box), idle_s))
    started = time.perf_counter()
    server.act(box, "pause")
    figures["pause, ms"]["ours"].append(time.perf_counter() - started)
    started = time.perf_counter()
    server.act(box, "resume")
    server.execute(box, "true")
    figures["resume to first command, ms"]["ours"].append(time.perf_counter() - started)
    server.delete(box)


def forks(server: RealServer, figures: Figures, number: int) -> None:
    box = server.create()["id"]
    started = time.perf_counter()
    made = [one["id"] for one in server.act(box, "fork", count=number)]
    for one in made:
        server.wait_running(one)
    figures[f"fork x{number}, ms"]["ours"].append(time.perf_counter() - started)
    for one in (box, *made):
        server.delete(one)


def has_golden(server: RealServer) -> bool:
    server.delete(server.create()["id"])
    return server.metric('sandyard_machine_start_seconds_count{way="restore"') > 0


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--forks", type=int, default=10)
    options.add_argument("--idle", type=float, default=20.0)
    chosen = options.parse_args()
    guests = guests_of("firecracker")
    assert guests.verdict.is_usable, guests.verdict.reason
    figures: Figures = defaultdict(lambda: defaultdict(list))
    sh(
        f"ip netns add {NETNS}; ip netns exec {NETNS} ip link set lo up; "
        f"ip netns exec {NETNS} ip tuntap add {TAP} mode tap; "
        f"ip netns exec {NETNS} ip addr add 172.16.0.1/30 dev {TAP}; "
        f"ip netns exec {NETNS} ip link set {TAP} up"
    )
    outside = os.open("/proc/self/ns/net", os.O_RDONLY)
    inside = os.open(f"/run/netns/{NETNS}", os.O_RDONLY)

    def enter(where: int) -> None:
        if ctypes.CDLL(None).setns(where, 0x40000000) != 0:  # CLONE_NEWNET
            raise OSError("cannot enter a network namespace")

    server = RealServer(
        free_port(), **environment_of("firecracker"), SANDYARD_POOL__CEILING="0",
    )  # fmt: skip
    try:
        with (
            paced(guests.pace),
            tempfile.TemporaryDirectory(prefix="sy-", dir="/tmp") as place,
            contextlib.ExitStack() as held,
        ):
            server.start()
            server.delete(server.create()["id"])
            wait_until(lambda: has_golden(server), limit_s=300, what="a golden machine is there")
            enter(inside)
            hand = ByHand(Path(place), held)
            for number in range(chosen.rounds):
                idle_s = chosen.idle if number == 0 else 0.0
                enter(inside)
                hand.round(figures, idle_s=idle_s)
                enter(outside)
                ours(server, figures, idle_s=idle_s)
            enter(inside)
            hand.forks(figures, chosen.forks)
            enter(outside)
            forks(server, figures, chosen.forks)
    finally:
        enter(outside)
        server.remove()
        sh(f"ip netns del {NETNS}")
    found = {}
    for name, sides in figures.items():
        scale = 1000 if name.endswith("ms") else 1
        p50 = {side: round(percentile(values, 0.5) * scale, 1) for side, values in sides.items()}
        p50["ratio"] = round(p50["ours"] / max(p50["by hand"], 0.1), 2)
        found[name] = p50
    print(json.dumps({"kernel": str(guests.kernel or "distribution"), "p50": found}, indent=1))


if __name__ == "__main__":
    main()
