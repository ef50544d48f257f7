"""Files with holes: copied and digested without reading or filling the holes."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from sandyard.server.core.errors import InternalError, NoCapacityError

_CHUNK = 1024 * 1024
_HOLE = 64 * 1024
_FICLONE = 0x40049409  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # the same
_libc = ctypes.CDLL(None)
# Between file systems of two kinds, and where one of them cannot (copy_file_range(2)).
_NOT_BY_KERNEL = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file: as a reflink where the file system can, otherwise its data without its holes.

    Raises:
        NoCapacityError: the host's disk is full; nothing of the copy is left.
    """
    with source.open("rb") as there, target.open("xb") as here:
        os.fchmod(here.fileno(), 0o600)
        try:
            if not _clone(there.fileno(), here.fileno()):
                os.truncate(here.fileno(), os.fstat(there.fileno()).st_size)
                for start, end in extents(there.fileno()):
                    _copy(there.fileno(), here.fileno(), start, end)
        except OSError as error:
            target.unlink()
            raise full_or_broken(error, f"copy {source.name}") from error


def write_sparse(descriptor: int, piece: bytes) -> None:
    """Write a piece at the current position, leaving holes for zeros. The caller sets the size of
    the file at the end, since it may end with a hole."""
    for start in range(0, len(piece), _HOLE):
        chunk = piece[start : start + _HOLE]
        if chunk.count(0) == len(chunk):
            os.lseek(descriptor, len(chunk), os.SEEK_CUR)
            continue
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]


def make_empty(path: Path, size_mib: int) -> None:
    """Make a read-only file of zeros that uses no space."""
    with path.open("xb") as file:
        file.truncate(size_mib * 2**20)
        os.fchmod(file.fileno(), 0o444)


def merge_sparse(under: Path, over: Path, target: Path) -> None:
    """Write a file with another's data over it to a new read-only file, and sync that. Where the
    second has a hole, the first shows.

    Raises:
        NoCapacityError: the host's disk is full; nothing of the new file is left.
    """
    copy_sparse(under, target)
    with over.open("rb") as there, target.open("r+b") as here:
        try:
            for start, end in extents(there.fileno()):
                _copy(there.fileno(), here.fileno(), start, end)
            os.fchmod(here.fileno(), 0o444)
            os.fsync(here.fileno())
        except OSError as error:
            target.unlink()
            raise full_or_broken(error, f"write {target.name}") from error


def digest_sparse(path: Path) -> str:
    """Return the digest of a file's size and of its data with their positions; holes cost nothing.

    A range of zeros and a hole have different digests, so copies agree only if holes were
    preserved, as `copy_sparse` and a rename do.
    """
    digest = sha256()
    _feed(path, digest.update)
    return digest.hexdigest()


def mac_sparse(path: Path, key: bytes) -> str:
    """Return a keyed `digest_sparse`: ten times as fast, and for one file only.

    It is GMAC (NIST SP 800-38D) with a nonce of zeros, so `key`, of 16 bytes, must belong to this
    one file and never be used again.
    """
    mac = Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()
    _feed(path, mac.authenticate_additional_data)
    mac.finalize()
    return mac.tag.hex()


def _feed(path: Path, take: Callable[[bytes | memoryview], object]) -> None:
    piece = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        take(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
        for start, end in extents(file.fileno()):
            take(start.to_bytes(8, "little"))
            while start < end:
                read = os.preadv(file.fileno(), [piece[: min(_CHUNK, end - start)]], start)
                if not read:
                    break
                take(piece[:read])
                start += read


def begin_writing(descriptor: int, start: int, end: int) -> None:
    """Start writing this range of a file to the disk, because it will be synced later.

    Nothing is guaranteed, and a failure loses nothing (sync_file_range(2)).
    """
    _libc.sync_file_range(
        descriptor, ctypes.c_int64(start), ctypes.c_int64(end - start), _SYNC_FILE_RANGE_WRITE
    )


def extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each range of a file that holds data."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def has_holes(path: Path) -> bool:
    """Tell whether a range of a file holds no data."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return size > 0 and next(extents(file.fileno()), None) != (0, size)


def full_or_broken(error: OSError, what: str) -> InternalError | NoCapacityError:
    """Return the typed error for a failed write to the host's disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoCapacityError(f"cannot {what}: the host's disk is full; free some space")
    return InternalError(f"cannot {what}: {error.strerror}")


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copy(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            copied = os.copy_file_range(source, target, end - start, start, start)
        except OSError as error:
            if error.errno not in _NOT_BY_KERNEL:
                raise
            copied = os.pwrite(target, os.pread(source, min(_CHUNK, end - start), start), start)
        if not copied:
            return
        start += copied


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link; across file systems, a read-only copy with the same holes."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_sparse(source, target)
        target.chmod(0o444)
