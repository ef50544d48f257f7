"""Adds a machine's own secret to the initramfs that all machines of an image share.

The kernel unpacks concatenated archives (kernel documentation, "initramfs buffer format"). Their
content disappears when the root is switched, and is never on the machine's disk or its kernel
command line.
"""

import stat

_ALIGNMENT = 4


def add_token(initrd: bytes, token: str) -> bytes:
    """Return an initramfs with a file /token added, which only root can read."""
    own = cpio_entry("token", stat.S_IFREG | 0o600, token.encode())
    return padded(initrd) + own + cpio_entry("TRAILER!!!", 0, b"")


def cpio_entry(name: str, mode: int, data: bytes, *, device: tuple[int, int] = (0, 0)) -> bytes:
    """Return one entry of a cpio archive in the `newc` format (initramfs buffer format)."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return padded(head) + padded(data)


def padded(data: bytes) -> bytes:
    """Return data padded with zeros to where the next entry or archive may begin."""
    return data + bytes(-len(data) % _ALIGNMENT)
