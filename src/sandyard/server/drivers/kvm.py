"""Whether this host has KVM; that does not prove that it works."""

import os
from pathlib import Path

DEVICE = Path("/dev/kvm")
NO_KVM = f"{DEVICE} is not there or not open to this user"
"""Why a driver that needs it cannot be used now."""


def can_open(device: Path = DEVICE) -> bool:
    """Tell whether this process can open the device, and create a virtual machine."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
