"""The kernel as Firecracker boots it: the ELF file that lies packed in a bzImage.

Where it lies is told by the image's head (Documentation/arch/x86/boot.rst, `payload_offset` and
`payload_length`; the last four bytes of the payload are the unpacked size).
"""

import contextlib
import gzip
import lzma
import os
import struct
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import UnavailableError

_LIMIT_S = 60.0
_ELF = b"\x7fELF"
_GZIP, _XZ, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"


def unpacked_kernel(bzimage: Path, cache: Path) -> Path:
    """Return the ELF file of a kernel, made once and kept in a folder.

    Raises:
        UnavailableError: the file is no bzImage, or packed in a way that is not known.
    """
    data = bzimage.read_bytes()
    target = cache / f"vmlinux-{sha256(data).hexdigest()[:24]}"
    if target.exists():
        return target
    elf = _unpack(_payload(data, bzimage), bzimage)
    if not elf.startswith(_ELF):
        raise UnavailableError(f"cannot boot {bzimage} with Firecracker: it holds no ELF kernel")
    cache.mkdir(mode=0o711, parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=cache, prefix=".vmlinux-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(elf)
            os.fchmod(descriptor, 0o444)
        Path(part).replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(part).unlink()
        raise
    return target


def _payload(data: bytes, bzimage: Path) -> bytes:
    if data[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", data, 0x206)[0] < 0x208:
        raise UnavailableError(f"cannot boot {bzimage} with Firecracker: it is no bzImage")
    start = ((data[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", data, 0x248)
    return data[start + offset : start + offset + length - 4]


def _unpack(payload: bytes, bzimage: Path) -> bytes:
    try:
        if payload.startswith(_ZSTD):
            return subprocess.run(
                ["zstd", "-dcq"], input=payload, capture_output=True, check=True, timeout=_LIMIT_S
            ).stdout
        if payload.startswith(_GZIP):
            return gzip.decompress(payload)
        if payload.startswith(_XZ):
            return lzma.decompress(payload)
    except (OSError, EOFError, lzma.LZMAError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"cannot unpack {bzimage} for Firecracker: {error}") from error
    raise UnavailableError(
        f"cannot boot {bzimage} with Firecracker: it is packed in a way that is not known here "
        f"({payload[:4].hex()}); zstd, gzip and xz are"
    )
