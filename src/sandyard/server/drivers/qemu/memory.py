"""A machine's memory on the host: a private mapping of a file that many machines share.

Only pages that the guest has written are its own: the kernel made private copies of them. They are
found through /proc/PID/pagemap, copied from process to process, and saved in a file:

    magic    8 bytes
    count    8 bytes, little-endian
    runs     count times: first page, number of pages; 8 bytes each
    pages    from the next multiple of a page on, in the order of the runs
"""

import ctypes
import os
import re
import struct
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

from sandyard.server.core.errors import ConflictError, InternalError, UnavailableError
from sandyard.server.drivers.sparse import begin_writing, copy_sparse, full_or_broken

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHUNK = 1024 * 1024
_BATCH_PAGES = 1024  # IOV_MAX: each may lie alone
_MAGIC = b"sypages1"
_RUNS_MAX = 1 << 26
# Of each entry's highest byte (Documentation/admin-guide/mm/pagemap.rst): in memory or in swap, and
# not the file's own page.
_PRIVATE = bytes(1 if flags & 0xC0 and not flags & 0x20 else 0 for flags in range(256))

_read_stretches = ctypes.CDLL(None).process_vm_readv
_read_stretches.restype = ctypes.c_ssize_t
_read_stretches.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong,
)  # fmt: skip

Run = tuple[int, int]
"""First page and number of pages, counted from the beginning of the guest's memory."""


def save_pages(pid: int, memory: Path, target: Path) -> None:
    """Write a suspended machine's private pages to a new file, and begin to write that to the disk.

    Raises:
        NoCapacityError: the host's disk is full.
        UnavailableError: the process has ended.
        InternalError: its mapping of the file is not as expected.
    """
    try:
        with target.open("xb", buffering=0) as file:
            try:
                with _open_memory(pid, "rb") as source:
                    _save_pages(pid, source.fileno(), memory, file.fileno())
            except (ConflictError, FileNotFoundError, ProcessLookupError) as error:
                raise UnavailableError(
                    "cannot save the machine's memory: its process has ended"
                ) from error
    except OSError as error:
        raise full_or_broken(error, "save the machine's memory") from error


def _save_pages(pid: int, source: int, memory: Path, target: int) -> None:
    start, size = _mapping(pid, memory)
    runs = _private_runs(pid, start, size)
    head = _head(runs)
    _write(target, memoryview(head))
    begin_writing(target, 0, written := len(head))
    room = bytearray(_BATCH_PAGES * _PAGE)
    for batch in _batches(runs):
        stretches = [(start + first * _PAGE, count * _PAGE) for first, count in batch]
        if not _gather(pid, stretches, room):
            _gather_by_file(source, stretches, room)
        length = sum(length for _, length in stretches)
        _write(target, memoryview(room)[:length])
        begin_writing(target, written, written + length)
        written += length
    # Memory was asked for by the process's number, which may be another's by now; what is open is
    # of the one that was meant, and reads nothing once that has ended.
    if not os.pread(source, 1, start):
        raise ProcessLookupError


def load_pages(pid: int, memory: Path, source: Path) -> None:
    """Write saved pages into the memory of a machine that has not run yet.

    Raises:
        ConflictError: the file is incomplete, or belongs to a machine with another memory size.
    """
    start, size = _mapping(pid, memory)
    with source.open("rb", buffering=0) as file, _open_memory(pid, "r+b") as target:
        runs, offset = _read_runs(file.fileno())
        total = sum(count for _, count in runs)
        if os.fstat(file.fileno()).st_size != offset + total * _PAGE:
            raise ConflictError("the saved memory is not whole")
        for first, count in runs:
            if (first + count) * _PAGE > size:
                raise ConflictError("the saved memory is larger than the machine's")
            for at, piece in _pieces(file.fileno(), offset, count * _PAGE):
                _write_at(target.fileno(), piece, start + first * _PAGE + at)
            offset += count * _PAGE


def merge(memory: Path, pages: Path, target: Path) -> None:
    """Write a memory file with saved pages over it to a new, sparse file, and sync it.

    Raises:
        NoCapacityError: the host's disk is full.
        ConflictError: the pages are incomplete.
    """
    try:
        copy_sparse(memory, target)
        with pages.open("rb") as above, target.open("r+b", buffering=0) as file:
            out = file.fileno()
            runs, offset = _read_runs(above.fileno())
            for first, count in runs:
                for at, piece in _pieces(above.fileno(), offset, count * _PAGE):
                    _write_at(out, piece, first * _PAGE + at)
                offset += count * _PAGE
            os.fchmod(out, 0o444)
            os.fsync(out)
    except OSError as error:
        raise full_or_broken(error, "save the machine's memory") from error


def _mapping(pid: int, memory: Path) -> Run:
    """Return the address and length of a machine's memory in its process."""
    suffix = f" {memory}\n"
    found: list[Run] = []
    with Path(f"/proc/{pid}/maps").open() as maps:
        for line in maps:
            if line.endswith(suffix):
                start, end = (int(word, 16) for word in line.split(" ", 1)[0].split("-"))
                if found and sum(found[-1]) == start:
                    found[-1] = (found[-1][0], end - found[-1][0])
                else:
                    found.append((start, end - start))
    if not found:
        raise ProcessLookupError("the process has ended, and maps nothing")
    # The process reports its mappings, and is not trusted.
    if len(found) != 1 or found[0][1] != memory.stat().st_size:
        raise InternalError(f"cannot find the memory of process {pid}: {len(found)} mappings")
    return found[0]


def _private_runs(pid: int, start: int, size: int) -> list[Run]:
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        entries = b"".join(
            piece for _, piece in _pieces(pagemap.fileno(), start // _PAGE * 8, size // _PAGE * 8)
        )
    flags = entries[7::8].translate(_PRIVATE)
    return [(found.start(), found.end() - found.start()) for found in re.finditer(b"\x01+", flags)]


def _head(runs: list[Run]) -> bytes:
    head = _MAGIC + struct.pack("<Q", len(runs))
    head += b"".join(struct.pack("<QQ", *run) for run in runs)
    return head + bytes(-len(head) % _PAGE)


def _read_runs(descriptor: int) -> tuple[list[Run], int]:
    """Return the runs of a file of pages, and the position of its pages."""
    start = os.pread(descriptor, 16, 0)
    count = struct.unpack("<Q", start[8:])[0] if len(start) == 16 else _RUNS_MAX
    if not start.startswith(_MAGIC) or count >= _RUNS_MAX:
        raise ConflictError("the saved memory cannot be understood")
    table = b"".join(piece for _, piece in _pieces(descriptor, 16, count * 16))
    end = 16 + len(table)
    return list(struct.iter_unpack("<QQ", table)), end + -end % _PAGE


def _pieces(descriptor: int, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
    """Yield what a file holds in pieces, each with where it begins, counted from `offset`."""
    done = 0
    while done < length:
        piece = os.pread(descriptor, min(_CHUNK, length - done), offset + done)
        if not piece:
            raise ConflictError("the saved state is not whole")
        yield done, piece
        done += len(piece)


def _batches(runs: list[Run]) -> Iterator[list[Run]]:
    """Yield the same pages in batches that are copied at once."""
    batch, free = list[Run](), _BATCH_PAGES
    for first, left in runs:
        while left:
            count = min(left, free)
            batch.append((first, count))
            first, left, free = first + count, left - count, free - count
            if not free:
                yield batch
                batch, free = [], _BATCH_PAGES
    if batch:
        yield batch


class _Stretch(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _gather(pid: int, stretches: list[tuple[int, int]], room: bytearray) -> bool:
    """Read ranges of a process's memory into the beginning of `room`, one after the other.

    It takes two thirds of the time of reading /proc/PID/mem (process_vm_readv(2)). Return False if
    that is impossible: some kernels lack the call, and some containers forbid it.
    """
    size = sum(length for _, length in stretches)
    here = _Stretch(ctypes.addressof(ctypes.c_char.from_buffer(room)), size)
    there = b"".join([struct.pack("@PN", *one) for one in stretches])
    done: int = _read_stretches(pid, ctypes.byref(here), 1, there, len(stretches), 0)
    return done == size


def _gather_by_file(memory: int, stretches: list[tuple[int, int]], room: bytearray) -> None:
    at = 0
    for start, length in stretches:
        for _, piece in _pieces(memory, start, length):
            room[at : at + len(piece)] = piece
            at += len(piece)


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        if done == 0:  # a process that has ended takes nothing, and says so like this
            raise ProcessLookupError("the machine's process has ended")
        view, offset = view[done:], offset + done


def _open_memory(pid: int, mode: Literal["rb", "r+b"]) -> FileIO:
    return Path(f"/proc/{pid}/mem").open(mode, buffering=0)
