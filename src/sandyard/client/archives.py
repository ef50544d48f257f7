"""Files and folders of this computer, as streams of bytes: packed as they are read, and unpacked
without trust."""

import itertools
import os
import posixpath
import secrets
import shutil
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from sandyard.client.errors import TransferError
from sandyard.client.models import OutsideLink

PIECE = 1024 * 1024
_PATH_MAX = 4096  # linux/limits.h
_DEPTH_MAX = 256
_ENTRIES_MAX = 1_000_000
_NAMES_MAX = 256 * 1024 * 1024
_HEADER_MAX = 128 * 1024
_HEADERS_MAX = 4  # before one entry: a pax header, a long name and a long link at most
_EXTENDED = frozenset({
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
})  # fmt: skip
Progress = Callable[[int], object]


def unpack(pieces: Iterator[bytes], target: Path, what: str) -> list[OutsideLink]:
    """Write an archive of the folder `what` to a folder here, and nothing outside of it, whatever
    is in the archive. A new folder appears when it is complete.

    Symbolic links that lead into the folder stay links, relative ones. Those that lead out of it
    are written as they are and returned; nothing is written through them.

    Memory does not grow with what the archive says: extended headers, entries, depth and the sum
    of all sizes are bounded, the sum by the free space of the target's disk.

    Raises:
        TransferError: not all of it may be, or can be, written here.
        OSError: it cannot be written here.
    """
    is_new = not os.path.lexists(target)
    place = _part_of(target) if is_new else target
    place.mkdir(parents=True, exist_ok=True)
    try:
        bounds = _Bounds(shutil.disk_usage(place).free, _root_of(what))
        with _Archive.open(  # type: ignore[call-overload]
            fileobj=_Pieces(pieces), mode="r|", tarinfo=bounds.header_class()
        ) as archive:
            archive.extractall(place, _entries(archive), filter=bounds.checked)  # noqa: S202
        if is_new:
            place.rename(target)
    except (
        tarfile.TarError, ValueError, KeyError, OverflowError, RecursionError, EOFError,
    ) as error:  # fmt: skip
        left = "" if is_new else f"; what came before that is in {target}"
        raise TransferError(f"cannot copy {what} here: {error}{left}") from error
    finally:
        if is_new:
            shutil.rmtree(place, ignore_errors=True)
    return bounds.outside


def _root_of(what: str) -> str:
    """Return the absolute path of a folder of a sandbox."""
    return posixpath.normpath(posixpath.join("/workspace", what))


class _Archive(tarfile.TarFile):
    """An archive that is read once, from its beginning to its end."""

    def getmembers(self) -> list[tarfile.TarInfo]:
        """See tarfile, which asks for all entries where a link cannot be made: that would keep
        every one of them."""
        raise tarfile.ReadError("a link leads to what is not there")


def _entries(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the entries of an archive, without keeping those already read in memory."""
    while (entry := archive.next()) is not None:
        yield entry
        archive.members.clear()  # type: ignore[attr-defined]


class _Bounds:
    """What one archive may have in all, and has had so far."""

    def __init__(self, free_bytes: int, root: str) -> None:
        self._free = free_bytes
        self._root = root
        self.outside: list[OutsideLink] = []
        self._bytes = 0
        self._names = 0
        self._entries = 0
        self._headers = 0

    def header_class(self) -> type[tarfile.TarInfo]:
        """Return the class that reads headers, and refuses what would take memory without bound.

        tarfile reads the whole of an extended header at once, and calls itself for each that
        follows another; a map of holes it reads as long as there are more.
        """
        seen = self._seen

        class Header(tarfile.TarInfo):
            @classmethod
            def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
                found = super().frombuf(buf, encoding, errors)
                seen(found)
                return found

            def _proc_gnusparse_10(self, *_: object) -> None:
                raise tarfile.ReadError("the archive has files with maps of holes")

        return Header

    def _seen(self, header: tarfile.TarInfo) -> None:
        if header.type in _EXTENDED:
            self._headers += 1
            if header.size > _HEADER_MAX or self._headers > _HEADERS_MAX:
                raise tarfile.ReadError("a name or its attributes are too long")
            return
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("the archive has files with maps of holes")
        self._headers = 0
        self._entries += 1
        if self._entries > _ENTRIES_MAX:
            raise tarfile.ReadError(f"it has more than {_ENTRIES_MAX} files and directories")

    def checked(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        """Let an entry through if it is harmless and within bounds; see `_inside`."""
        found = self._link(member, folder) if member.issym() else _inside(member, folder)
        found.pax_headers = {}  # folders are kept until the end
        self._names += len(found.name) + len(found.linkname)
        self._bytes += found.size if found.isreg() else 0
        if found.name.count("/") >= _DEPTH_MAX:
            raise tarfile.FilterError(f"its directories are nested more than {_DEPTH_MAX} deep")
        if self._names > _NAMES_MAX:
            raise tarfile.FilterError("its names are too long in all")
        if self._bytes > self._free:
            raise tarfile.FilterError(
                f"it is larger than the {self._free // 2**20} MiB that are free here"
            )
        return found

    def _link(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        """Let a symbolic link through, relative if it leads into the folder."""
        place = _check_way(member, member.name, folder)  # as tarfile takes it, with any ".."
        name = posixpath.normpath(member.name.lstrip("/"))
        above = posixpath.dirname(name)
        if os.path.islink(place):
            os.unlink(place)  # tarfile would follow it to find out where this one would be
        found = tarfile.tar_filter(member, folder).replace(
            **dict.fromkeys(("uid", "gid", "uname", "gname")),  # type: ignore[arg-type]  # ours
            deep=False,
        )
        target = posixpath.normpath(posixpath.join(self._root, above, found.linkname))
        if target == self._root or target.startswith(f"{self._root.rstrip('/')}/"):
            if found.linkname.startswith("/"):
                start = posixpath.normpath(posixpath.join(self._root, above))
                return found.replace(linkname=posixpath.relpath(target, start), deep=False)
        else:
            self.outside.append(OutsideLink(name, found.linkname))
        return found


def _check_way(found: tarfile.TarInfo, name: str, folder: str, *, is_whole: bool = False) -> str:
    """Return where an entry would be written, if no link is on the way to it. If the way is whole,
    it is no link itself."""
    place, parts = folder, [one for one in name.split("/") if one not in ("", ".")]
    for number, part in enumerate(parts, 1):
        place = os.path.join(place, part)
        if len(os.fsencode(place)) >= _PATH_MAX or part == "..":
            raise tarfile.OutsideDestinationError(found, place)
        if os.path.islink(place) and (is_whole or number < len(parts)):
            raise tarfile.OutsideDestinationError(found, place)
    return place


def _inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Let through what is harmless, and lies in `folder` without a link on the way to it.

    tarfile's own filter follows links by realpath(3), which gives up on paths that are too long:
    an archive can be made so that it takes a link out of the folder for one that stays in it
    (CVE-2025-4517). Who packs a folder puts nothing behind a link.
    """
    found = tarfile.data_filter(member, folder)
    if found.islnk():
        _check_way(found, found.linkname, folder, is_whole=True)
    place = _check_way(found, found.name, folder)
    if os.path.islink(place) or (found.islnk() and os.path.isfile(place)):
        os.unlink(place)  # what comes takes its place; it would be written to where it leads
    return found


def begun(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Fetch the first piece and return an equivalent iterator, so that a refusal is raised here and
    not during the iteration."""
    first = list(itertools.islice(pieces, 1))
    return itertools.chain(first, pieces)


@contextmanager
def written(target: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file that replaces `target` if the block succeeds. A link is followed, the
    mode of an existing file is kept, and a special file is written directly."""
    try:
        found = target.stat()
    except FileNotFoundError:
        found = None
    if found is not None and not stat.S_ISREG(found.st_mode):
        with target.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(target))
    # A name of its own: another may be written to the same place, or have ours for its own.
    part = _part_of(target)
    try:
        with part.open("xb") as file:
            if found is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(found.st_mode))
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _part_of(target: Path) -> Path:
    return target.with_name(f".sandyard-{secrets.token_hex(8)}.part")


class _Pieces:
    """A file object that reads pieces once, in order."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int) -> bytes:
        while len(self._left) < size and (more := next(self._pieces, None)) is not None:
            self._left += more
        data, self._left = self._left[:size], self._left[size:]
        return data


@contextmanager
def packed(folder: Path) -> Iterator[IO[bytes]]:
    """Yield a tar archive of a folder, made as it is read."""
    reader, writer = os.pipe()
    trouble: list[BaseException] = []

    def pack() -> None:
        try:
            with (
                os.fdopen(writer, "wb") as file,
                tarfile.open(fileobj=file, mode="w|") as archive,
            ):
                archive.add(os.path.realpath(folder), arcname=".")  # not the link to it
        except BrokenPipeError:
            pass  # the reader has closed it; the error is reported elsewhere
        except OSError as error:
            trouble.append(error)

    packing = threading.Thread(target=pack, daemon=True)
    packing.start()
    with os.fdopen(reader, "rb") as archive:
        yield archive
    packing.join()
    if trouble:
        raise trouble[0]


def pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    """Yield a file's content in pieces."""
    while data := file.read(PIECE):
        yield data


def with_progress(pieces: Iterator[bytes], on_progress: Progress | None) -> Iterator[bytes]:
    """Yield pieces, and tell how large each was."""
    for piece in pieces:
        yield piece
        if on_progress is not None:
            on_progress(len(piece))
