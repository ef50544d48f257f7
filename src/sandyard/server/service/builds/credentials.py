"""Credentials for registries of container images. They are named by id, and never shown again."""

import base64
import json
import re
from typing import Final

from sandyard.server.core.errors import ConflictError, InvalidArgumentError, NotFoundError
from sandyard.server.core.ids import checked_text, is_uuid, new_uuid
from sandyard.server.core.records import RegistryCredential
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.platform import Platform

REGISTRY: Final = (
    r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*"
    r"(?::[0-9]{1,5})?"
)
"""What names of registries are like."""
_HOST = re.compile(REGISTRY)
_MOST: Final = 50
TEXT_MAX = 8192
DOCKER_HUB: Final = "docker.io"
# Where Docker's clients keep the credentials of their own registry.
_HUB_KEY = "https://index.docker.io/v1/"
_HUB_HOSTS = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})


def host_of(image: str) -> str:
    """Return the registry of an image, as Docker's references have it."""
    first, slash, _ = image.partition("/")
    is_host = slash and ("." in first or ":" in first or first == "localhost")
    return _plain(first) if is_host else DOCKER_HUB


def _plain(host: str) -> str:
    return DOCKER_HUB if host in _HUB_HOSTS else host


def _may_use(actor: Actor, credential: RegistryCredential) -> bool:
    return actor.sees_all or credential.owner_user_id == actor.user_id


class RegistryCredentials:
    """The credentials of organizations."""

    def __init__(self, platform: Platform) -> None:
        self._store = platform.store
        self._clock = platform.clock
        self._repeats = platform.repeats

    async def add(
        self,
        actor: Actor,
        *,
        host: str,
        username: str,
        password: str,
        request: Repeatable | None = None,
    ) -> RegistryCredential:
        """Keep a credential. A repeated `request` returns the first one's.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            ConflictError: there are too many.
        """
        actor.require("template:write")
        if len(host) > 255 or not _HOST.fullmatch(host):
            raise InvalidArgumentError(
                "cannot use host: write it as a name with an optional port, such as ghcr.io or "
                "registry.example.org:5000",
                field="host",
            )
        for field, text in (("username", username), ("password", password)):
            checked_text(text, field=field)
            if not 1 <= len(text) <= TEXT_MAX or not text.isprintable():
                raise InvalidArgumentError(
                    "cannot use {field}: it needs 1 to 8192 printable characters", field=field
                )
        if ":" in username:
            raise InvalidArgumentError("cannot use username: it has a colon", field="username")
        made = RegistryCredential(
            id=new_uuid(),
            org_id=actor.org_id,
            owner_user_id=actor.user_id,
            host=_plain(host),
            username=username,
            password=password,
            created_at=self._clock.now(),
        )
        async with self._repeats.turn(actor, request), self._store.write(actor.org_id) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            if ids is not None:
                known = await tx.credentials.find(actor.org_id, ids[0])
                if known is None:
                    raise NotFoundError("cannot find the credential that was added: it was deleted")
                return known
            if len(await tx.credentials.of(actor.org_id)) >= _MOST:
                raise ConflictError(
                    f"cannot keep another credential: an organization has {_MOST} at most"
                )
            await tx.credentials.add(made)
            await tx.activity.append(
                line(
                    "registry_credential.added",
                    "Registry credential added",
                    org_id=actor.org_id,
                    actor=actor,
                    resource_id=made.id,
                    at=made.created_at,
                    summary=made.host,
                )
            )
            await self._repeats.note(tx, actor, request, (made.id,))
        return made

    async def every(self, actor: Actor) -> list[RegistryCredential]:
        """Return the credentials that the actor may use, newest first: their own, and for an
        admin all of the organization."""
        actor.require("template:read")
        async with self._store.read() as tx:
            found = await tx.credentials.of(actor.org_id)
        return [one for one in found if _may_use(actor, one)]

    async def delete(self, actor: Actor, credential_id: str) -> None:
        """Delete a credential. Builds that have begun keep it.

        Raises:
            NotFoundError: there is none.
        """
        actor.require("template:write")
        async with self._store.write(actor.org_id) as tx:
            found = await tx.credentials.find(actor.org_id, credential_id)
            if found is None or not _may_use(actor, found):
                raise NotFoundError("cannot find the credential: check its id")
            await tx.credentials.remove(actor.org_id, credential_id)
            await tx.activity.append(
                line(
                    "registry_credential.deleted",
                    "Registry credential deleted",
                    org_id=actor.org_id,
                    actor=actor,
                    resource_id=credential_id,
                    at=self._clock.now(),
                )
            )

    async def check(self, actor: Actor, credential_id: str, *, image: str | None) -> None:
        """Refuse a credential that a build cannot use.

        Raises:
            InvalidArgumentError: there is none, or it is for another registry than the image's.
        """
        # The user who requests a build can log in to its machine and read the password there.
        found = await self._find(actor.org_id, credential_id)
        if found is None or not _may_use(actor, found):
            raise InvalidArgumentError(
                "cannot use {field}: you have no such credential; `sandyard registry list` shows "
                "those that you may use",
                field="credentials",
            )
        if image is not None and host_of(image) != found.host:
            raise InvalidArgumentError(
                f"cannot use {{field}}: it is for {found.host}, and the image is at "
                f"{host_of(image)}",
                field="credentials",
            )

    async def auth_file(self, org_id: str, credential_id: str) -> bytes:
        """Return the file by which tools find a credential (containers-auth.json(5)).

        Raises:
            InvalidArgumentError: it was deleted.
        """
        found = await self._find(org_id, credential_id)
        if found is None:
            raise InvalidArgumentError("cannot build: its registry credential was deleted")
        key = _HUB_KEY if found.host == DOCKER_HUB else found.host
        secret = base64.b64encode(f"{found.username}:{found.password}".encode()).decode()
        return json.dumps({"auths": {key: {"auth": secret}}}).encode()

    async def _find(self, org_id: str, credential_id: str) -> RegistryCredential | None:
        if not is_uuid(credential_id):
            return None
        async with self._store.read() as tx:
            return await tx.credentials.find(org_id, credential_id)
