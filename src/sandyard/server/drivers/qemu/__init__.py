"""QEMU, with KVM where the host's really works and by translation (TCG) everywhere else."""

from sandyard.server.drivers.qemu.driver import QemuDriver

__all__ = ["QemuDriver"]
