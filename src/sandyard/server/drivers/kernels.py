"""Kernels as files: the ELF program that is compressed in a bzImage, and its properties.

The image's header says where it is (Documentation/arch/x86/boot.rst, `payload_offset` and
`payload_length`). All compressions except gzip are followed by four more bytes with the
uncompressed size (scripts/Makefile.lib, `size_append`); gzip ends with those itself.
"""

import bz2
import contextlib
import gzip
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import UnavailableError

_LIMIT_S = 60.0
_SIZE = 4
_HEAD_SIZE = 0x250
_ELF = b"\x7fELF"
_ZSTD, _LZ4, _LZO = b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"\x89LZO"
_GZIP, _BZIP2, _XZ, _LZMA = b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00"
_CONFIG = re.compile(rb"IKCFG_ST(\x1f\x8b.*?)IKCFG_ED", re.DOTALL)
_RELEASE = re.compile(rb"Linux version (\d[^ \0]{1,63}) ")
_CONFIG_MAX = 4 * 2**20


@dataclass(frozen=True)
class KernelInfo:
    """The properties of a kernel. `options` are the enabled ones of its configuration without
    `CONFIG_`, or None if the configuration is not included (CONFIG_IKCONFIG)."""

    release: str
    options: Mapping[str, str] | None

    @property
    def has_acpi(self) -> bool:
        """Whether it finds devices by ACPI; assumed if the configuration is not included."""
        return self.options is None or self.options.get("ACPI") == "y"


def unpacked_kernel(image: Path, cache: Path) -> Path:
    """Return the ELF file of a kernel, made once and kept in a folder.

    Raises:
        UnavailableError: the file is not a kernel, or its compression is unknown.
    """
    data = _read(image)
    target = cache / f"vmlinux-{sha256(data).hexdigest()[:24]}"
    if target.exists():
        return target
    elf = unpacked(data, image)
    cache.mkdir(mode=0o711, parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=cache, prefix=".vmlinux-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(elf)
            file.flush()
            os.fsync(descriptor)  # its final name means that it is complete
            os.fchmod(descriptor, 0o444)
        Path(part).replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(part).unlink()
        raise
    return target


def kernel_info(image: Path) -> KernelInfo:
    """Return the properties of a kernel.

    Raises:
        UnavailableError: see `unpacked_kernel`.
    """
    elf = unpacked(_read(image), image)
    release = _RELEASE.search(elf)
    packed = _CONFIG.search(elf)
    options = None
    if packed is not None:
        try:
            text = zlib.decompressobj(wbits=31).decompress(packed[1], _CONFIG_MAX).decode()
        except (zlib.error, UnicodeDecodeError) as error:
            raise UnavailableError(f"cannot read the configuration in {image}: {error}") from error
        options = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))
    return KernelInfo(release[1].decode(errors="replace") if release else "unknown", options)


def unpacked(data: bytes, image: Path) -> bytes:
    """Return the ELF file in the bytes of a kernel.

    Raises:
        UnavailableError: see `unpacked_kernel`.
    """
    elf = data if data.startswith(_ELF) else _unpack(_payload(data, image), image)
    if not elf.startswith(_ELF):
        raise UnavailableError(f"cannot boot {image}: it holds no ELF kernel")
    return elf


def _read(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise UnavailableError(f"cannot read the kernel {image}: {error.strerror}") from error


def _payload(data: bytes, image: Path) -> bytes:
    is_bzimage = data[0x202:0x206] == b"HdrS" and len(data) >= _HEAD_SIZE
    if not is_bzimage or struct.unpack_from("<H", data, 0x206)[0] < 0x208:
        raise UnavailableError(f"cannot boot {image}: it is neither a bzImage nor an ELF vmlinux")
    start = ((data[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", data, 0x248)
    return data[start + offset : start + offset + length]


def _by_program(*command: str) -> Callable[[bytes], bytes]:
    def run(packed: bytes) -> bytes:
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(f"{command[0]} is not installed")
        return subprocess.run(
            command, input=packed, capture_output=True, check=True, timeout=_LIMIT_S
        ).stdout

    return run


_UNPACKERS: tuple[tuple[bytes, int, Callable[[bytes], bytes]], ...] = (
    (_ZSTD, _SIZE, _by_program("zstd", "-dcq")),
    (_GZIP, 0, gzip.decompress),
    (_XZ, _SIZE, lzma.decompress),
    (_LZMA, _SIZE, lzma.decompress),
    (_BZIP2, _SIZE, bz2.decompress),
    (_LZ4, _SIZE, _by_program("lz4", "-dcq")),
    (_LZO, _SIZE, _by_program("lzop", "-dcq")),
)


def _unpack(payload: bytes, image: Path) -> bytes:
    for magic, beyond, unpack in _UNPACKERS:
        if payload.startswith(magic):
            try:
                return unpack(payload[: len(payload) - beyond])
            except (
                OSError, EOFError, ValueError, zlib.error, lzma.LZMAError,
                subprocess.SubprocessError,
            ) as error:  # fmt: skip
                raise UnavailableError(f"cannot unpack {image}: {error}") from error
    raise UnavailableError(
        f"cannot boot {image}: it is packed in a way that is not known here "
        f"({payload[:4].hex()}); zstd, gzip, xz, lzma, bzip2, lz4 and lzo are"
    )
