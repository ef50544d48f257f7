"""Streams by which templates and versions are copied from and to a node."""

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from typing_extensions import override

from sandyard.server.core.contracts.node import ByteStream, Opened
from sandyard.server.core.copies import CopiedFile, Copy, ReadCopy, Wanted, WriteCopy
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    InvalidArgumentError,
    NoCapacityError,
    NotFoundError,
    UnavailableError,
)
from sandyard.server.drivers.sparse import write_sparse
from sandyard.server.node.commands import run
from sandyard.server.node.images.image import IMAGE_FILES, read_image
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.workshop import workshop
from sandyard.server.tasks import concurrently, in_thread

_AHEAD = 4
_ABOUT_MAX = 4 * 1024 * 1024
_SYNC_LIMIT_S = 600.0
_DIGEST = re.compile(r"[0-9a-z]{1,64}")


@asynccontextmanager
async def opened_copy(
    images: Images, operation: ReadCopy | WriteCopy
) -> AsyncIterator[Opened[Any]]:
    """Open an operation on a template or version. See core.contracts.node.NodeTunnel.open.

    Raises:
        NotFoundError: it is not here, or the node has no such template.
        ConflictError: the node has built the template itself.
        InvalidArgumentError: the request is malformed.
    """
    if isinstance(operation, ReadCopy):
        digest, paths = await in_thread(_files_of, images, operation.name)
        async with AsyncExitStack() as stack:
            # Open files can be read even if the template is removed meanwhile.
            files = [stack.enter_context(path.open("rb")) for path in paths]
            sizes = tuple(
                CopiedFile(path.name, os.fstat(file.fileno()).st_size)
                for path, file in zip(paths, files, strict=True)
            )
            yield Opened(Copy(operation.name, digest, sizes), _Reading(files))
        return
    copy, incoming = operation.copy, _Incoming()
    if await in_thread(_has, images, copy):
        yield Opened(Wanted(False), _Reading([]))
        return
    async with concurrently(_keep(images, copy, incoming)) as keeping:
        yield Opened(Wanted(True), _Writing(incoming, keeping))


def _has(images: Images, copy: Copy) -> bool:
    """Tell whether a copy is here already; an image is the template's current one then.

    Raises:
        NotFoundError: this node has no such template.
        ConflictError: it has built the template itself.
    """
    if "@" in copy.name:
        return images.versions.definition(copy.name) is not None
    if copy.name not in images.definitions:
        raise NotFoundError(f"cannot keep a copy of {copy.name}: this node has no such template")
    if images.is_own(copy.name):
        raise ConflictError(f"cannot keep a copy of {copy.name}: this node has built its own")
    if images.find(copy.digest) is None:
        return False
    images.use(copy.name, copy.digest, is_copy=True)
    return True


def _files_of(images: Images, name: str) -> tuple[str, Sequence[Path]]:
    paths: Sequence[Path] | None
    if "@" in name:
        digest, paths = "", images.versions.files(name)
    else:
        image = images.current(name)
        digest, paths = (image.digest, image.files) if image is not None else ("", None)
    if paths is None or not all(path.is_file() for path in paths):
        raise NotFoundError(f"cannot copy {name}: it is not here")
    return digest, paths


async def _keep(images: Images, copy: Copy, incoming: "_Incoming") -> None:
    try:
        if "@" in copy.name:
            await _keep_version(images, copy, incoming)
            return
        await _keep_image(images, copy, incoming)
        if not images.is_own(copy.name):  # built meanwhile
            images.use(copy.name, copy.digest, is_copy=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = NoCapacityError if full else UnavailableError
        raise kind(f"cannot keep a copy of {copy.name}: {error}") from error


async def _keep_version(images: Images, copy: Copy, incoming: "_Incoming") -> None:
    if len(copy.files) != 2 or copy.files[0].size_bytes > _ABOUT_MAX:
        raise InvalidArgumentError("cannot keep a copy: it has other files than a version")
    about = b"".join([piece async for piece in incoming.pieces(copy.files[0])])
    root = copy.files[1]
    await images.versions.keep_copy(
        copy.name, about, incoming.pieces(root), size_bytes=root.size_bytes
    )


async def _keep_image(images: Images, copy: Copy, incoming: "_Incoming") -> None:
    names = {one.name for one in copy.files}
    is_odd = not names <= IMAGE_FILES or len(names) < len(copy.files)
    if is_odd or not _DIGEST.fullmatch(copy.digest):
        raise InvalidArgumentError("cannot keep a copy: it has other files than an image")
    images.images_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        making = workshop(images.images_dir, ".copying-")
        made = await in_thread(stack.enter_context, making) / "made"
        try:
            made.mkdir()
            made.chmod(0o755)
            sums: dict[str, str] = {}
            for one in copy.files:
                digest = sha256()
                with (made / one.name).open("xb") as file:
                    async for piece in incoming.pieces(one):
                        digest.update(piece)
                        await in_thread(write_sparse, file.fileno(), piece)
                    os.truncate(file.fileno(), one.size_bytes)
                (made / one.name).chmod(0o444)
                sums[one.name] = digest.hexdigest()
            _check_image(made, copy.name, sums)
            await run(["sync", "-f", made], limit_s=_SYNC_LIMIT_S)
            if images.find(copy.digest) is None:
                made.rename(images.images_dir / copy.digest)
        finally:
            await in_thread(stack.close)


def _check_image(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    """Refuse what no node could use, what is not as it was built, and what would keep this node
    from reporting its templates. `sums` are the SHA-256 of the files.

    Raises:
        DamagedError: it is damaged.
    """
    image: Any
    try:
        image = read_image(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"cannot keep a copy of {name}: its manifest is damaged") from error
    if (
        image is None
        or image.created_at.tzinfo is None
        or not isinstance(image.inputs, dict)
        or not all(isinstance(one, str) for one in (image.os, *image.inputs.values()))
        or not isinstance(image.size_bytes, int)
        or not isinstance(image.sums, dict)
        or not all(one.is_file() for one in image.files)
    ):
        raise DamagedError(f"cannot keep a copy of {name}: it is not a whole image")
    files = {one.name for one in image.files} & image.sums.keys()
    if image.sums and len(files) < len(image.files) - 1:
        raise DamagedError(f"cannot keep a copy of {name}: its manifest lacks a file")
    for one in sorted(files):
        if sums[one] != image.sums[one]:
            raise DamagedError(
                f"cannot keep a copy of {name}: {one} is not as it was built; run `sandyard doctor "
                "--deep` on the host that it comes from"
            )


class _Incoming:
    """Files that come one after the other."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)
        self._rest = b""

    async def pieces(self, file: CopiedFile) -> AsyncIterator[bytes]:
        """Yield the contents of the next file.

        Raises:
            DamagedError: the stream ended before the file did.
        """
        left = file.size_bytes
        while left > 0:
            piece = self._rest or await self.queue.get()
            if not piece:
                raise DamagedError(f"cannot keep a copy: {file.name} is cut off")
            piece, self._rest = piece[:left], piece[left:]
            left -= len(piece)
            yield piece


class _Reading(ByteStream):
    """See core.contracts.node.ByteStream: files, one after the other."""

    def __init__(self, files: Sequence[IO[bytes]]) -> None:
        self._files = list(files)

    @override
    async def read(self, limit: int) -> bytes:
        try:
            while self._files:
                if data := await in_thread(self._files[0].read, limit):
                    return data
                del self._files[0]
        except OSError as error:
            raise UnavailableError(f"cannot read what is copied: {error}") from error
        return b""

    @override
    async def write(self, data: bytes) -> None:
        """Discard it: this stream is only read."""

    @override
    async def write_eof(self) -> None:
        """Do nothing."""


class _Writing(ByteStream):
    """See core.contracts.node.ByteStream: what is being kept."""

    def __init__(self, incoming: _Incoming, keeping: "asyncio.Task[None]") -> None:
        self._queue = incoming.queue
        self._keeping = keeping

    @override
    async def read(self, limit: int) -> bytes:
        """Return the end of the stream once everything is kept."""
        await asyncio.wait([self._keeping])
        self._keeping.result()
        return b""

    @override
    async def write(self, data: bytes) -> None:
        if data:
            await self._put(data)

    @override
    async def write_eof(self) -> None:
        await self._put(b"")

    async def _put(self, piece: bytes) -> None:
        async with concurrently(self._queue.put(piece)) as putting:
            await asyncio.wait([putting, self._keeping], return_when=asyncio.FIRST_COMPLETED)
