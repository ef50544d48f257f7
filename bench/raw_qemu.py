"""The same steps by hand: one QEMU, one tap, one socket, nothing of Sandyard's but image and agent.

What Sandyard takes is judged against this, as a ratio on the same machine at the same time.
"""

import ctypes
import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.images import minimal_image

from sandyard.server.drivers.initrd import add_token
from sandyard.server.drivers.qemu.command import EMULATED_CPU
from sandyard.server.drivers.qemu.tsc import measure_khz

NETNS = "bench-raw"
TOKEN = "b" * 64


def sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True)


def enter() -> None:
    descriptor = os.open(f"/run/netns/{NETNS}", os.O_RDONLY)
    if ctypes.CDLL(None).setns(descriptor, 0x40000000) != 0:
        raise OSError("setns")
    os.close(descriptor)


def exchange(op: str, *, limit_s: float = 5, **args: object) -> bytes:
    with socket.create_connection(("172.16.0.2", 9111), timeout=limit_s) as agent:
        agent.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = {"v": 1, "token": TOKEN, "op": op, "args": args}
        agent.sendall(json.dumps(head).encode() + b"\n")
        said = b""
        while b"\n" not in said or (op == "exec" and b'"exitCode"' not in said):
            data = agent.recv(65536)
            if not data:
                break
            said += data
        return said


def exec_true() -> float:
    started = time.perf_counter()
    said = exchange(
        "exec", command="true", timeoutMs=10_000, cwd="/", env={}, user="root", stdin=False
    )
    assert b'"exitCode": 0' in said, said
    return time.perf_counter() - started


def measure(boots: int, execs: int) -> dict[str, list[float]]:
    """Return seconds from start to agent, and seconds an exec of `true` took."""
    image, khz = minimal_image(), measure_khz()
    result: dict[str, list[float]] = {"boot": [], "exec": []}
    sh(f"ip netns add {NETNS}; ip -n {NETNS} link set lo up")
    enter()
    try:
        for number in range(boots):
            with tempfile.TemporaryDirectory() as folder:
                result["boot"].append(boot(image, khz, Path(folder), execs, number, result))
    finally:
        sh(f"ip netns del {NETNS}")
    return result


def boot(
    image: object, khz: int, work: Path, execs: int, number: int, result: dict[str, list[float]]
) -> float:
    tap = f"t{number}"
    sh(f"ip tuntap add {tap} mode tap; ip addr add 172.16.0.1/30 dev {tap}; ip link set {tap} up")
    started = time.perf_counter()
    sh(f"mke2fs -q -t ext4 -m 0 -J size=16 {work}/disk 5120M")
    folder = image.folder  # type: ignore[attr-defined]
    (work / "initrd").write_bytes(add_token((folder / "initrd").read_bytes(), TOKEN))
    qemu = subprocess.Popen(
        [
            "qemu-system-x86_64", "-M", "microvm,acpi=on,rtc=on",
            "-accel", "tcg,tb-size=128,thread=multi", "-cpu", EMULATED_CPU,
            "-m", "528M", "-smp", "1",
            "-kernel", f"{folder}/vmlinuz", "-initrd", f"{work}/initrd",
            "-append", "console=ttyS0 reboot=t panic=-1 quiet loglevel=3 tsc=reliable "
            f"tsc_early_khz={khz} cryptomgr.notests initcall_blacklist=jent_mod_init",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{work}/console",
            "-drive", f"id=tools,file={folder}/tools.erofs,format=raw,if=none,readonly=on",
            "-device", "virtio-blk-device,drive=tools",
            "-drive", f"id=root,file={folder}/root.erofs,format=raw,if=none,readonly=on",
            "-device", "virtio-blk-device,drive=root",
            "-drive", f"id=b,file={work}/disk,format=raw,if=none",
            "-device", "virtio-blk-device,drive=b",
            "-netdev", f"tap,id=n,ifname={tap},script=no,downscript=no",
            "-device", "virtio-net-device,netdev=n",
        ]
    )  # fmt: skip
    try:
        while True:
            try:
                with socket.create_connection(("172.16.0.2", 9111), timeout=0.2):
                    break
            except OSError:
                time.sleep(0.02)
        exchange("hello")
        took = time.perf_counter() - started
        result["exec"] += [exec_true() for _ in range(execs)]
        return took
    finally:
        qemu.kill()
        qemu.wait()
        sh(f"ip link del {tap}")


if __name__ == "__main__":
    import sys

    json.dump(measure(int(sys.argv[1]), int(sys.argv[2])), sys.stdout)
