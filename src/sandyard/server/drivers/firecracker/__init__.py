"""Firecracker under its jailer, where the host's KVM really works."""

from sandyard.server.drivers.firecracker.driver import FirecrackerDriver

__all__ = ["FirecrackerDriver"]
