"""Files that were uploaded for builds: archives of images, and contexts of Dockerfiles.

    uploads/<id>        on the server that received it, and that will build with it

An upload is removed when its build has ended, and after a day in any case. One with a name is kept
for a day, for every build that needs it. The control plane never opens one.
"""

import contextlib
import hashlib
import hmac
import json
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    InvalidArgumentError,
    InvalidTokenError,
    LimitReachedError,
    NoCapacityError,
    PayloadTooLargeError,
    TokenExpiredError,
)
from sandyard.server.core.ids import is_uuid, new_secret, new_uuid
from sandyard.server.core.plans import Plan
from sandyard.server.core.records import Kept, Upload
from sandyard.server.service.actor import Actor, plan_of
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.signers import Signers, signer_of
from sandyard.server.tasks import in_thread

KEPT: Final = timedelta(hours=24)
"""How long an upload is kept for its build."""
_READ = 256 * 1024
_FRESH: Final = timedelta(hours=12)
_NAMES: Final = uuid.UUID("5c0a6c5e-7c0d-4f0e-9a35-0b6a3b0f4d55")
_NAMED_VERSION: Final = 5
_AT_ONCE = 200
_PERMIT_S = 3600
_PURPOSE = b"sandyard: uploads for builds, 1"
_SCOPE = "template:write"
_FLOOR_BYTES = 1024**3


@dataclass(frozen=True)
class Permit:
    """A signed permission to upload what a template's builds know by a `name`. `by` is the signer,
    and `expires` is in seconds since 1970."""

    slug: str
    name: str
    by: str
    expires: int


class Uploads:
    """The uploads on this server."""

    def __init__(
        self, platform: Platform, signers: Signers, folder: Path, *, size_max: int
    ) -> None:
        self._signers = signers
        self._key = hmac.digest(platform.key, _PURPOSE, hashlib.sha256)
        self._store = platform.store
        self._clock = platform.clock
        self._plans: Mapping[str, Plan] = platform.plans
        self._server_id = platform.server_id
        self._folder = folder
        self._size_max = size_max
        self._coming: Counter[str] = Counter()
        self._arriving: Counter[str] = Counter()

    @staticmethod
    def named(actor: Actor, slug: str, name: str) -> str:
        """Return the id of the upload that a user's builds of a template know by a name."""
        return str(uuid.uuid5(_NAMES, "/".join((actor.org_id, actor.user_id, slug, name))))

    def permit(self, actor: Actor, slug: str, name: str) -> tuple[Permit, str]:
        """Return the permission for one upload within an hour, and its signature."""
        actor.require(_SCOPE)
        expires = int(self._clock.now().timestamp()) + _PERMIT_S
        permit = Permit(slug, name, f"{actor.org_id}:{signer_of(actor)}", expires)
        return permit, self._signature(permit)

    async def enter(self, permit: Permit, signature: str) -> Actor:
        """Return the actor on whose behalf a permission is used.

        Raises:
            InvalidTokenError: the signature does not match, or its signer has lost the right.
            TokenExpiredError: it has expired.
        """
        if not hmac.compare_digest(signature.encode(), self._signature(permit).encode()):
            raise InvalidTokenError("cannot accept the URL: the signature does not match")
        if permit.expires <= self._clock.now().timestamp():
            raise TokenExpiredError("cannot accept the URL: it has expired; request a new one")
        org_id, _, signer = permit.by.partition(":")
        actor = await self._signers.actor(org_id, signer, _SCOPE)
        if actor is None:
            raise InvalidTokenError("cannot accept the URL: its signer no longer has the right")
        return actor

    def _signature(self, permit: Permit) -> str:
        signed = json.dumps([permit.slug, permit.name, permit.by, permit.expires])
        return hmac.digest(self._key, signed.encode(), hashlib.sha256).hex()

    async def has(self, actor: Actor, upload_id: str) -> bool:
        """Tell whether an upload is on this server, for half a day or longer."""
        async with self._store.read() as tx:
            found = await tx.uploads.find(actor.org_id, upload_id)
        if found is None or found.server_id != self._server_id:
            return False
        return found.created_at > self._clock.now() - _FRESH

    async def take(
        self, actor: Actor, body: AsyncIterator[bytes], *, upload_id: str | None = None
    ) -> Upload:
        """Keep a stream; with an `upload_id` of `named` it replaces that upload.

        Raises:
            PayloadTooLargeError: it is larger than allowed; nothing is kept.
            LimitReachedError: the organization has too many uploads.
            NoCapacityError: the disk is full.
        """
        actor.require(_SCOPE)
        async with self._store.read() as tx:
            kept = await tx.uploads.kept(actor.org_id)
            known = await tx.uploads.find(actor.org_id, upload_id) if upload_id else None
        if known is not None:  # it is replaced
            kept = Kept(kept.count - 1, kept.size_bytes - known.size_bytes)
        if kept.count + self._coming[actor.org_id] >= _AT_ONCE:
            raise _too_many()
        limit = plan_of(self._plans, actor).template_gb
        size_max = self._size_max if limit is None else min(self._size_max, limit * 2**30)
        is_new = upload_id is None
        upload_id = upload_id or new_uuid()
        path, left = self._path(upload_id), size_max - kept.size_bytes
        self._coming[actor.org_id] += 1
        try:
            async with self._written(actor.org_id, path, body, left) as (part, size, digest):
                upload = Upload(
                    upload_id, actor.org_id, actor.user_id, self._server_id, size, digest,
                    self._clock.now(),
                )  # fmt: skip
                try:
                    async with self._store.write(actor.org_id) as tx:
                        await tx.uploads.remove(upload_id)
                        # Others may have ended meanwhile, here or on another server.
                        _check_room(await tx.uploads.kept(actor.org_id), size, size_max)
                        await tx.uploads.add(upload)
                        part.rename(path)
                except BaseException:
                    if is_new:
                        path.unlink(missing_ok=True)
                    raise
        finally:
            self._coming[actor.org_id] -= 1
        return upload

    @asynccontextmanager
    async def _written(
        self, org_id: str, path: Path, body: AsyncIterator[bytes], left: int
    ) -> AsyncIterator[tuple[Path, int, str]]:
        """Yield a temporary file with all of a stream, its size and its digest. The streams of an
        organization that arrive at the same time may have `left` bytes together."""
        await in_thread(self._folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        part, size, digest = path.with_suffix(f".{new_secret()}"), 0, hashlib.sha256()
        try:
            with part.open("xb") as file:
                async for piece in body:
                    size += len(piece)
                    self._arriving[org_id] += len(piece)
                    if self._arriving[org_id] > left:
                        raise _too_large(left)
                    digest.update(piece)
                    await in_thread(file.write, piece)
                    self._check_disk()
                await in_thread(os.fsync, file.fileno())
            yield part, size, digest.hexdigest()
        except OSError as error:
            raise NoCapacityError("cannot keep the upload: the disk is full") from error
        finally:
            self._arriving[org_id] -= size
            part.unlink(missing_ok=True)

    def _check_disk(self) -> None:
        left = os.statvfs(self._folder)
        if left.f_bavail * left.f_frsize < _FLOOR_BYTES:
            raise NoCapacityError("cannot keep the upload: the disk is full")

    async def find(self, actor: Actor, upload_id: str, *, field: str) -> Upload:
        """Return an upload of the actor's organization. One with a name is for steps alone.

        Raises:
            InvalidArgumentError: there is none; `facts` name the field.
        """
        found = None
        if is_uuid(upload_id):
            async with self._store.read() as tx:
                found = await tx.uploads.find(actor.org_id, upload_id)
        if found is None or (field != "steps" and uuid.UUID(upload_id).version == _NAMED_VERSION):
            raise InvalidArgumentError(
                "cannot use {field}: there is no such upload; upload it again, since each is kept "
                "for a day or until the end of its build",
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

    async def remove(self, upload_id: str, *, since: datetime | None = None) -> None:
        """Remove an upload; with `since`, only if it is from that time."""
        async with self._store.write(Turn.SHARED) as tx:
            is_gone = await tx.uploads.remove(upload_id, since=since)
        if is_gone:
            self._path(upload_id).unlink(missing_ok=True)

    async def tidy(self) -> None:
        """Remove old uploads of this server, and files that belong to none."""
        if not self._folder.is_dir():
            return
        now = self._clock.now()
        async with self._store.read() as tx:
            every = await tx.uploads.old(self._server_id, before=now + KEPT)
        for one in every:
            if one.created_at < now - KEPT:
                await self.remove(one.id, since=one.created_at)  # it may be replaced meanwhile
        known = {one.id for one in every}
        for path in list(self._folder.iterdir()):
            is_old = path.stat().st_mtime < now.timestamp() - KEPT.total_seconds()
            if path.name not in known and is_old:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, upload_id: str) -> Path:
        if not is_uuid(upload_id):
            raise AssertionError(f"not the id of an upload: {upload_id!r}")
        return self._folder / upload_id


def _check_room(kept: Kept, size: int, size_max: int) -> None:
    if kept.count >= _AT_ONCE:
        raise _too_many()
    if kept.size_bytes + size > size_max:
        raise _too_large(size_max - kept.size_bytes)


def _too_many() -> LimitReachedError:
    return LimitReachedError(
        f"cannot keep another upload: {_AT_ONCE} are kept; each is removed after a day",
        limit=_AT_ONCE,
    )


def _too_large(left: int) -> PayloadTooLargeError:
    limit = max(0, left)
    return PayloadTooLargeError(f"cannot keep an upload of over {limit >> 20} MiB", limit=limit)
