"""Files that were uploaded for builds: archives of images, and contexts of Dockerfiles.

    uploads/<id>        on the server that received it, and that will build with it

An upload is removed when its build has ended, and after a day in any case. The control plane never
opens one.
"""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    InvalidArgumentError,
    LimitReachedError,
    NoCapacityError,
    PayloadTooLargeError,
)
from sandyard.server.core.ids import is_uuid, new_uuid
from sandyard.server.core.plans import Plan
from sandyard.server.core.records import Upload
from sandyard.server.service.actor import Actor, plan_of
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.tasks import in_thread

_KEPT: Final = timedelta(hours=24)
_READ = 256 * 1024
_AT_ONCE = 20
_FLOOR_BYTES = 1024**3


class Uploads:
    """The uploads on this server."""

    def __init__(self, platform: Platform, folder: Path, *, size_max: int) -> None:
        self._store = platform.store
        self._clock = platform.clock
        self._plans: Mapping[str, Plan] = platform.plans
        self._server_id = platform.server_id
        self._folder = folder
        self._size_max = size_max
        self._coming: Counter[str] = Counter()

    async def take(self, actor: Actor, body: AsyncIterator[bytes]) -> Upload:
        """Keep a stream.

        Raises:
            PayloadTooLargeError: it is larger than allowed; nothing is kept.
            LimitReachedError: the organization has too many uploads.
            NoCapacityError: the disk is full.
        """
        actor.require("template:write")
        async with self._store.read() as tx:
            kept = await tx.uploads.kept(actor.org_id)
        if kept.count + self._coming[actor.org_id] >= _AT_ONCE:
            raise LimitReachedError(
                f"cannot keep another upload: {_AT_ONCE} wait for their builds; each is removed "
                "after a day",
                limit=_AT_ONCE,
            )
        limit = plan_of(self._plans, actor).template_gb
        size_max = self._size_max if limit is None else min(self._size_max, limit * 2**30)
        upload_id = new_uuid()
        self._coming[actor.org_id] += 1
        try:
            left = size_max - kept.size_bytes
            size, digest = await self._written(self._path(upload_id), body, left)
        finally:
            self._coming[actor.org_id] -= 1
        upload = Upload(
            upload_id, actor.org_id, actor.user_id, self._server_id, size, digest, self._clock.now()
        )
        try:
            async with self._store.write(actor.org_id) as tx:
                await tx.uploads.add(upload)
        except BaseException:
            self._path(upload_id).unlink(missing_ok=True)
            raise
        return upload

    async def _written(
        self, path: Path, body: AsyncIterator[bytes], size_max: int
    ) -> tuple[int, str]:
        await in_thread(self._folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        part, size, digest = path.with_suffix(".part"), 0, hashlib.sha256()
        try:
            with part.open("xb") as file:
                async for piece in body:
                    size += len(piece)
                    if size > size_max:
                        raise PayloadTooLargeError(
                            f"cannot keep an upload of over {max(0, size_max) >> 20} MiB",
                            limit=max(0, size_max),
                        )
                    digest.update(piece)
                    await in_thread(file.write, piece)
                    self._check_disk()
                await in_thread(os.fsync, file.fileno())
            part.rename(path)
        except OSError as error:
            raise NoCapacityError("cannot keep the upload: the disk is full") from error
        finally:
            part.unlink(missing_ok=True)
        return size, digest.hexdigest()

    def _check_disk(self) -> None:
        left = os.statvfs(self._folder)
        if left.f_bavail * left.f_frsize < _FLOOR_BYTES:
            raise NoCapacityError("cannot keep the upload: the disk is full")

    async def find(self, actor: Actor, upload_id: str, *, field: str) -> Upload:
        """Return an upload of the actor's organization.

        Raises:
            InvalidArgumentError: there is none; `facts` name the field.
        """
        found = None
        if is_uuid(upload_id):
            async with self._store.read() as tx:
                found = await tx.uploads.find(actor.org_id, upload_id)
        if found is None:
            raise InvalidArgumentError(
                "cannot use {field}: there is no such upload; each is kept for a day, and one "
                "build uses it",
                field=field,
            )
        return found

    async def read(self, upload_id: str) -> AsyncIterator[bytes]:
        """Yield the bytes of an upload on this server.

        Raises:
            InvalidArgumentError: it is not here any more.
        """
        try:
            file = self._path(upload_id).open("rb")
        except FileNotFoundError as error:
            raise InvalidArgumentError(
                "cannot build: what was uploaded is no longer here; upload it again"
            ) from error
        with file:
            while piece := await in_thread(file.read, _READ):
                yield piece

    async def remove(self, upload_id: str) -> None:
        """Remove an upload."""
        self._path(upload_id).unlink(missing_ok=True)
        async with self._store.write(Turn.SHARED) as tx:
            await tx.uploads.remove(upload_id)

    async def tidy(self) -> None:
        """Remove old uploads of this server, and files that belong to none."""
        if not self._folder.is_dir():
            return
        now = self._clock.now()
        async with self._store.read() as tx:
            every = await tx.uploads.old(self._server_id, before=now + _KEPT)
        for one in every:
            if one.created_at < now - _KEPT:
                await self.remove(one.id)
        known = {one.id for one in every}
        for path in list(self._folder.iterdir()):
            is_old = path.stat().st_mtime < now.timestamp() - _KEPT.total_seconds()
            if path.name not in known and is_old:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, upload_id: str) -> Path:
        if not is_uuid(upload_id):
            raise AssertionError(f"not the id of an upload: {upload_id!r}")
        return self._folder / upload_id
