"""Firecracker under its jailer, on hosts where KVM works."""

from sandyard.server.drivers.firecracker.driver import FirecrackerDriver

__all__ = ["FirecrackerDriver"]
