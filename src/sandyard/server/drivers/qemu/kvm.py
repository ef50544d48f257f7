"""/dev/kvm for accounts with no privilege, and what of a processor it gives their guests."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.drivers.kvm import DEVICE

_SET = 9
_SOFTWARE = Path("/sys/module/kvm_pvm")
_GROUP_RW, _OTHERS_RW = stat.S_IRGRP | stat.S_IWGRP, stat.S_IROTH | stat.S_IWOTH


@dataclass(frozen=True)
class Door:
    """How an account comes to the device: as one of a group, by a descriptor that it is left, or,
    with neither, as anybody does."""

    group: int | None = None
    fd: int | None = None

    @property
    def arguments(self) -> list[str]:
        """QEMU's arguments for guests that run by it, on the processor that the host has."""
        device, given = "", list[str]()
        if self.fd is not None:
            given = ["-add-fd", f"fd={self.fd},set={_SET},opaque=kvm"]
            device = f",device=/dev/fdset/{_SET}"
        # Where KVM is software, IA32_ARCH_CAPABILITIES can be read but not set, and QEMU aborts.
        lacking = ",arch-capabilities=off" if _SOFTWARE.exists() else ""
        return [*given, "-accel", f"kvm{device}", "-cpu", f"host{lacking}"]


@contextmanager
def door(device: Path = DEVICE) -> Iterator[Door]:
    """Find out how accounts come to the device; a descriptor is closed again at the end.

    Distributions leave it to a group of its own. Where it is root's alone, as without udev, it is
    opened here: to make an account one of root's group would open more than that to it.

    Raises:
        OSError: it is not there, or closed to this process as well.
    """
    found = device.stat()
    if found.st_mode & _OTHERS_RW == _OTHERS_RW:
        yield Door()
    elif found.st_mode & _GROUP_RW == _GROUP_RW and found.st_gid != 0:
        yield Door(group=found.st_gid)
    else:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield Door(fd=fd)
        finally:
            os.close(fd)
