"""QEMU, with KVM where that works and by emulation (TCG) everywhere else."""

from sandyard.server.drivers.qemu.driver import QemuDriver

__all__ = ["QemuDriver"]
