"""A machine's memory as the host sees it: a private mapping of a file that many machines share.

Only what a guest has written is its own: the kernel made those pages private copies. They are found
through /proc/PID/pagemap, copied through /proc/PID/mem, and kept in a file:

    magic    8 bytes
    count    8 bytes, little-endian
    runs     count times: first page, number of pages; 8 bytes each
    pages    from the next multiple of a page on, in the order of the runs
"""

import os
import re
import struct
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

from sandyard.server.core.errors import ConflictError, InternalError
from sandyard.server.drivers.sparse import begin_writing, copy_sparse, full_or_broken

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHUNK = 1024 * 1024
_BEGUN_EACH = 4 * _CHUNK
_MAGIC = b"sypages1"
_RUNS_MAX = 1 << 26
# Of each entry's highest byte (Documentation/admin-guide/mm/pagemap.rst): in memory or in swap, and
# not the file's own page.
_PRIVATE = bytes(1 if flags & 0xC0 and not flags & 0x20 else 0 for flags in range(256))

Run = tuple[int, int]
"""First page and number of pages, counted from the beginning of the guest's memory."""


def save_pages(pid: int, memory: Path, target: Path) -> None:
    """Write a still machine's private pages to a new file, which is on its way to the disk then.

    Raises:
        NoCapacityError: the host's disk is full.
        InternalError: the process does not map the file.
    """
    start, size = _mapping(pid, memory)
    runs = _private_runs(pid, start, size)
    try:
        with target.open("xb", buffering=0) as file, _open_memory(pid, "rb") as source:
            begun = written = file.write(_head(runs))
            for first, count in runs:
                _copy(source.fileno(), start + first * _PAGE, count * _PAGE, file.fileno())
                written += count * _PAGE
                if written - begun >= _BEGUN_EACH:
                    begin_writing(file.fileno(), begun, written)
                    begun = written
            begin_writing(file.fileno(), begun, written)
    except OSError as error:
        raise full_or_broken(error, "save the machine's memory") from error


def load_pages(pid: int, memory: Path, source: Path) -> None:
    """Write saved pages into the memory of a machine that has not run yet.

    Raises:
        ConflictError: the file is not whole, or of a machine with less or more memory.
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
    """Write a memory file with saved pages laid over it to a new, sparse file, and sync it.

    Raises:
        NoCapacityError: the host's disk is full.
        ConflictError: the pages are not whole.
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
    """Return where in its process a machine's memory begins and how long it is."""
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
    # The process says what it maps, and is not to be believed.
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
    """Return the runs of a file of pages, and where its pages begin."""
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


def _copy(source: int, offset: int, length: int, target: int) -> None:
    for _, piece in _pieces(source, offset, length):
        view = memoryview(piece)
        while view:
            view = view[os.write(target, view) :]


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        if done == 0:  # a process that has ended takes nothing, and says so like this
            raise ProcessLookupError("the machine's process has ended")
        view, offset = view[done:], offset + done


def _open_memory(pid: int, mode: Literal["rb", "r+b"]) -> FileIO:
    return Path(f"/proc/{pid}/mem").open(mode, buffering=0)
