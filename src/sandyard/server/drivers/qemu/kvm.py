"""Access to /dev/kvm for unprivileged accounts, and the CPU features for their guests."""

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
    """How an account accesses the device: as a member of a group, with an inherited descriptor, or,
    with neither, because it is open to all."""

    group: int | None = None
    fd: int | None = None

    @property
    def arguments(self) -> list[str]:
        """QEMU's arguments for guests that use KVM with the host's CPU."""
        device, given = "", list[str]()
        if self.fd is not None:
            given = ["-add-fd", f"fd={self.fd},set={_SET},opaque=kvm"]
            device = f",device=/dev/fdset/{_SET}"
        # Where KVM is software, IA32_ARCH_CAPABILITIES can be read but not set, and QEMU aborts.
        lacking = ",arch-capabilities=off" if _SOFTWARE.exists() else ""
        return [*given, "-accel", f"kvm{device}", "-cpu", f"host{lacking}"]


@contextmanager
def door(device: Path = DEVICE) -> Iterator[Door]:
    """Find out how accounts access the device; an opened descriptor is closed after the block.

    Distributions give it to a group of its own. If only root can open it, as without udev, it is
    opened here: adding the account to root's group would give access to more than that.

    Raises:
        OSError: it does not exist, or this process cannot open it either.
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
