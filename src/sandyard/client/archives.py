"""Files and folders of this computer, as streams of bytes: packed as they are read, and unpacked
without trust."""

import itertools
import os
import secrets
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sandyard.client.errors import TransferError

PIECE = 1024 * 1024
_PATH_MAX = 4096  # linux/limits.h
Progress = Callable[[int], object]


def unpack(pieces: Iterator[bytes], target: Path, what: str) -> None:
    """Write an archive to a folder here, and nothing outside of it, whatever is in the archive.

    Raises:
        TransferError: not all of it may be, or can be, written here.
        OSError: it cannot be written here.
    """
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=_Pieces(pieces), mode="r|") as archive:  # type: ignore[call-overload]
            archive.extractall(target, filter=_inside)  # noqa: S202  # stricter than "data"
    except tarfile.TarError as error:
        raise TransferError(f"cannot copy {what} here: {error}") from error


def _inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Let through what is harmless, and lies in `folder` without a link on the way to it.

    tarfile's own filter follows links by realpath(3), which gives up on paths that are too long:
    an archive can be made so that it takes a link out of the folder for one that stays in it
    (CVE-2025-4517). Who packs a folder puts nothing behind a link.
    """
    found = tarfile.data_filter(member, folder)
    names = [(found.name, False)]
    if found.islnk():
        names.append((found.linkname, True))
    for name, is_whole in names:
        place, parts = folder, [one for one in name.split("/") if one not in ("", ".")]
        for number, part in enumerate(parts, 1):
            place = os.path.join(place, part)
            is_last = number == len(parts)
            if len(os.fsencode(place)) >= _PATH_MAX or part == "..":
                raise tarfile.OutsideDestinationError(found, place)
            if os.path.islink(place) and (is_whole or not is_last):
                raise tarfile.OutsideDestinationError(found, place)
        if not is_whole and (os.path.islink(place) or (found.islnk() and os.path.isfile(place))):
            os.unlink(place)  # what comes takes its place; it would be written to where it leads
    return found


def begun(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Return pieces of which the first is there, so that whatever refuses them has done so."""
    first = list(itertools.islice(pieces, 1))
    return itertools.chain(first, pieces)


@contextmanager
def written(target: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which takes the place of `target` once the block has ended well.

    Where a link leads is written, the mode of what is there is kept, and what is no plain file, a
    device say, is written to as it is.
    """
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
    part = target.with_name(f".sandyard-{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            if found is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(found.st_mode))
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class _Pieces:
    """Pieces, as a file that can be read once."""

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
            pass  # nobody reads on: what is told of that is elsewhere
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
    """Yield what is in a file."""
    while data := file.read(PIECE):
        yield data


def told(pieces: Iterator[bytes], on_progress: Progress | None) -> Iterator[bytes]:
    """Yield pieces, and tell how large each was."""
    for piece in pieces:
        yield piece
        if on_progress is not None:
            on_progress(len(piece))
