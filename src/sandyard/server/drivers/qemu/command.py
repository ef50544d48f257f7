"""QEMU's command line for a machine, and the confinement of its process."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandyard.server.drivers.contract import MachineSpec
from sandyard.server.drivers.namespaces import path_of
from sandyard.server.drivers.qemu.kvm import Door

QMP_SOCKET = "qmp.sock"
PID_FILE = "qemu.pid"
INITRD = "initrd"
DEVICE_STATE = "device"
CONSOLE = "console"
DISK = "disk"
CONSOLE_SIZE = 256 * 1024
_OWN_SHARE_MIB = 16
# TCG runs string instructions a byte at a time. Where a processor does not promise that those are
# fast, kernel and libc copy in words and vectors. A state saved with the flag can be restored.
EMULATED_CPU = "max,-erms,-fsrm"
# When the cache of translated code is full, QEMU discards all of it: Ubuntu with `node` and
# `python3` fills 70 MiB, a browser far more. Only what is used is taken from the host.
_LEAST_TRANSLATED_MIB, _MOST_TRANSLATED_MIB = 128, 256
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def machine_memory_mib(asked_mib: int) -> int:
    """Return the memory size for a guest that should have about the requested size.

    A few MiB are added for the kernel. It is never exactly 2048 MiB: with a disk attached, this
    machine type then damages the end of the initramfs.
    """
    given = asked_mib + _OWN_SHARE_MIB
    return given + 8 if given == 2048 else given


def translated_mib(memory_mib: int) -> int:
    """Return the size of the cache for translated code: a quarter of the memory, within bounds."""
    return min(max(memory_mib // 4, _LEAST_TRANSLATED_MIB), _MOST_TRANSLATED_MIB)


def kernel_command_line(*, tsc_khz: int | None, extra: str = "") -> str:
    """Return the kernel's command line; `tsc_khz` is set under TCG only."""
    words = ["console=ttyS0 reboot=t panic=-1 quiet loglevel=3"]
    if tsc_khz is not None:
        words.append(f"tsc=reliable tsc_early_khz={tsc_khz}")
        # Self-tests of ciphers and of a source of jitter take over half a second when emulated.
        words.append("cryptomgr.notests initcall_blacklist=jent_mod_init")
    return " ".join([*words, extra]).strip()


def accelerator(door: Door | None, *, tb_size_mib: int) -> list[str]:
    """Return the arguments for KVM if there is a `door` to it, otherwise for TCG."""
    if door is not None:
        return door.arguments
    return ["-accel", f"tcg,tb-size={tb_size_mib},thread=multi", "-cpu", EMULATED_CPU]


def machine_arguments(
    spec: MachineSpec,
    *,
    door: Door | None,
    tb_size_mib: int,
    tsc_khz: int | None,
    tap_fd: int,
    is_restored: bool,
) -> list[str]:
    """Return QEMU's arguments for a machine that boots, or waits for a saved state.

    The two look the same to a running guest, because a state fits only the machine it was saved
    from. Kernel and initramfs are left out in the second case: they are in the guest's memory
    already. Only the devices' state is transferred, without its description, because memory is a
    file.
    """
    folder = spec.folder
    memory_mib = machine_memory_mib(spec.memory_mib)
    waiting = ["-S", "-incoming", "defer", "-global", "migration.send-configuration=off"]
    acpi = "on" if spec.has_acpi else "off"
    booting = [
        "-kernel", str(spec.kernel),
        "-initrd", str(folder / INITRD),
        "-append", kernel_command_line(tsc_khz=tsc_khz, extra=spec.arguments),
    ]  # fmt: skip
    return [
        "-name", spec.name,
        "-M", f"microvm,acpi={acpi},rtc=on,suppress-vmdesc=on,memory-backend=memory",
        *accelerator(door, tb_size_mib=tb_size_mib),
        "-m", f"{memory_mib}M",
        "-object", f"memory-backend-file,id=memory,size={memory_mib}M,merge=off,"
                   f"mem-path={_escaped(spec.memory)},share=off,readonly=on,rom=off",
        "-smp", str(spec.vcpus),
        *(waiting if is_restored else booting),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        # A machine that ends is stopped instead, so that its last output can be read.
        "-action", "shutdown=pause,panic=pause",
        "-chardev", f"ringbuf,id={CONSOLE},size={CONSOLE_SIZE}",
        "-serial", f"chardev:{CONSOLE}",
        *_read_only(spec.roots),
        "-drive", f"id={DISK},file={_escaped(spec.disk)},format=raw,if=none,discard=unmap",
        "-device", f"virtio-blk-device,drive={DISK}",
        "-netdev", f"tap,id=net,fd={tap_fd}",
        "-device", f"virtio-net-device,netdev=net,mac={spec.place.mac}",
        "-qmp", f"unix:{_escaped(folder / QMP_SOCKET)},server=on,wait=off",
        "-pidfile", str(folder / PID_FILE),
        "-sandbox", _SANDBOX,
    ]  # fmt: skip


def _read_only(roots: Sequence[Path]) -> Iterator[str]:
    for number, path in enumerate(roots):
        yield from (
            "-drive",
            f"id=root{number},file={_escaped(path)},format=raw,if=none,readonly=on",
            "-device",
            f"virtio-blk-device,drive=root{number}",
        )


def unprivileged(uid: int, *, group: int | None = None) -> list[str]:
    """Return the command that runs another as an account without privileges or other groups."""
    groups = ["--clear-groups"] if group is None else ["--groups", str(group)]
    return [
        "setpriv", "--reuid", str(uid), "--regid", str(uid), *groups, "--no-new-privs",
        "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--",
        "prlimit", "--core=0:0", "--",
    ]  # fmt: skip


def confined(
    binary: str,
    arguments: list[str],
    spec: MachineSpec,
    *,
    group: int | None,
    mounts: Path | None,
) -> list[str]:
    """Return the command that starts QEMU in its namespaces and account, without privileges.

    `mounts` names a mount namespace, if there is one.
    """
    view = [] if mounts is None or not os.path.ismount(mounts) else [f"--mount={mounts}"]
    return [
        # Its parent ends at once, so QEMU is adopted by init and outlives the server.
        "setsid", "--fork",
        "nsenter", f"--net={path_of(spec.place.netns)}", *view, "--",
        *unprivileged(spec.place.uid, group=group),
        binary, *arguments,
    ]  # fmt: skip


def _escaped(path: Path) -> str:
    """Return a path in QEMU's option syntax, with commas doubled."""
    return str(path).replace(",", ",,")
