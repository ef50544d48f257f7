"""Workspaces: who may use them, their sizes, and their deletion.

A row is written before its volume is created, and outlives it. So every volume has a row, whatever
is interrupted, and interrupted deletions are resumed.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

from sandyard.server.core.contracts.store import Transaction, Turn
from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.core.errors import (
    AlreadyExistsError,
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    LimitReachedError,
    NotFoundError,
    SandyardError,
    WorkspaceInUseError,
)
from sandyard.server.core.ids import PERSONAL, check_slug, is_uuid, new_uuid, slug_of
from sandyard.server.core.node_ops import WithdrawWorkspace
from sandyard.server.core.records import Activity, Sandbox, StoragePeriod, User, Workspace
from sandyard.server.service.actor import Actor, plan_of
from sandyard.server.service.lines import line
from sandyard.server.service.people.organizations import check_title
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.platform import Platform

log = logging.getLogger(__name__)

WORKSPACES_MAX = 1000
_BEAT_S = 60.0
_DUTY = "workspaces"
_DUTY_LASTS = timedelta(seconds=1.5 * _BEAT_S)
_RESTS = 2  # beats, after which another server has taken the duty
_ACCESS = timedelta(minutes=1)
_GIB = 1024**3


@dataclass(frozen=True)
class Owned:
    """A workspace and its owner."""

    workspace: Workspace
    owner: User | None


@dataclass(frozen=True)
class Storage:
    """An organization's stored bytes in workspaces; a quota of None is unlimited."""

    used_bytes: int
    quota_bytes: int | None


class Workspaces:
    """The operations. Each takes the actor and never discloses another organization's
    workspaces."""

    def __init__(
        self,
        platform: Platform,
        *,
        volumes: Volumes,
        quota_bytes: int,
    ) -> None:
        self._store = platform.store
        self._server_id = platform.server_id
        self._rests = 0
        self._volumes = volumes
        self._repeats = platform.repeats
        self._clock = platform.clock
        self._plans = platform.plans
        self._quota_bytes = quota_bytes
        self._nodes = platform.nodes

    async def page(self, actor: Actor, *, of_all: bool) -> tuple[list[Owned], Storage]:
        """Return the organization's workspaces and the actor's own, for an admin with `of_all`
        those of all members, and the organization's total storage.

        Raises:
            PermissionDeniedError: `of_all` is for admins.
        """
        actor.require("files:read")
        if of_all and not actor.sees_all:
            actor.require_admin()
        async with self._store.read() as tx:
            every = await tx.workspaces.of(actor.org_id)
            owners = {user.id: user for user, _ in await tx.users.members(actor.org_id)}
            shown = [
                self._sized(one)
                for one in every
                if not one.is_personal or of_all or one.owner_user_id == actor.user_id
            ]
            for one in shown:  # some are no longer members
                if one.owner_user_id and one.owner_user_id not in owners:
                    found = await tx.users.find(user_id=one.owner_user_id)
                    owners.update({found.id: found} if found else {})
        owned = [Owned(one, owners.get(one.owner_user_id or "")) for one in shown]
        return owned, self._storage_of(actor, every)

    def _sized(self, workspace: Workspace) -> Workspace:
        """Return a workspace with the quota that its volume will get at first use."""
        if workspace.is_personal and workspace.last_accessed_at is None:
            return replace(workspace, quota_bytes=self._quota_bytes)
        return workspace

    async def storage(self, actor: Actor) -> Storage:
        """Return the storage of all the organization's workspaces, and its plan's limit."""
        async with self._store.read() as tx:
            return self._storage_of(actor, await tx.workspaces.of(actor.org_id))

    def _storage_of(self, actor: Actor, every: list[Workspace]) -> Storage:
        limit = plan_of(self._plans, actor).storage_gb
        used = sum(one.size_bytes for one in every)
        return Storage(used, None if limit is None else limit * _GIB)

    async def get(self, actor: Actor, reference: str) -> Owned:
        """Return a workspace by id or slug.

        Raises:
            NotFoundError: the actor has no such workspace.
        """
        actor.require("files:read")
        async with self._store.read() as tx:
            return await self._found(tx, actor, reference)

    async def find(self, actor: Actor, reference: str) -> Workspace:
        """Return a workspace that the actor may see, without checking further rights.

        Raises:
            NotFoundError: there is none.
        """
        async with self._store.read() as tx:
            return (await self._found(tx, actor, reference)).workspace

    async def _found(self, tx: Transaction, actor: Actor, reference: str) -> Owned:
        found = await tx.workspaces.find(actor.org_id, reference)
        if found is None or not _sees(actor, found):
            raise NotFoundError("cannot find the workspace: check its id")
        owner = None
        if found.owner_user_id is not None:
            owner = await tx.users.find(user_id=found.owner_user_id)
        return Owned(self._sized(found), owner)

    async def create(
        self,
        actor: Actor,
        name: str,
        slug: str | None = None,
        *,
        org_id: str | None = None,
        request: Repeatable | None = None,
    ) -> Owned:
        """Create a workspace for the organization.

        Raises:
            InvalidArgumentError: name or slug is invalid.
            AlreadyExistsError: the slug is taken.
            LimitReachedError: the organization has too many.
            NotFoundError: `org_id` is not the actor's organization.
        """
        actor.require("files:write")
        name = check_title(name, field="name")
        if org_id is not None and org_id != actor.org_id:
            raise NotFoundError(
                "cannot find the organization: use one of its credentials, or leave {field} out",
                field="org_id",
            )
        if slug is not None and is_uuid(slug):
            raise InvalidArgumentError(
                "cannot use this slug: it reads as an id; choose another", field="slug"
            )
        if slug is not None and slug.startswith(PERSONAL):
            raise InvalidArgumentError(
                f"cannot use this slug: {PERSONAL}… is a member's own; choose another", field="slug"
            )
        workspace_id, now = new_uuid(), self._clock.now()
        workspace = Workspace(
            workspace_id,
            actor.org_id,
            None,
            slug_of(name, workspace_id) if slug is None else check_slug(slug),
            name,
            False,
            now,
            now,
            quota_bytes=self._quota_bytes,
        )
        async with self._repeats.turn(actor, request), self._store.write(actor.org_id) as tx:
            made = await self._repeats.made_before(tx, actor, request)
            if made is not None:
                return await self._found(tx, actor, made[0])
            if len(await tx.workspaces.of(actor.org_id)) >= WORKSPACES_MAX:
                raise LimitReachedError(
                    f"cannot have over {WORKSPACES_MAX} workspaces: delete one first"
                )
            if not await tx.workspaces.add(workspace):
                raise AlreadyExistsError(
                    f"cannot use the slug {workspace.slug!r}: another workspace has it",
                    field="slug",
                )
            await self._repeats.note(tx, actor, request, (workspace.id,))
            await tx.activity.append(
                self._line(actor, workspace, "workspace.created", "Workspace created")
            )
        return Owned(workspace, None)

    async def rename(self, actor: Actor, reference: str, name: str) -> Owned:
        """Rename a workspace. Its slug does not change.

        Raises:
            NotFoundError: there is no such workspace.
            InvalidArgumentError: the name is invalid.
        """
        actor.require("files:write")
        name = check_title(name, field="name")
        async with self._store.write(actor.org_id) as tx:
            found = await self._found(tx, actor, reference)
            changed = replace(found.workspace, name=name, updated_at=self._clock.now())
            await tx.workspaces.replace(changed)
            await tx.activity.append(
                self._line(actor, changed, "workspace.renamed", "Workspace renamed")
            )
        return Owned(changed, found.owner)

    async def mounting(self, actor: Actor, reference: str) -> tuple[Workspace, list[Sandbox]]:
        """Return a workspace, and the sandboxes that have it mounted.

        Members see only the number of other members' sandboxes: those have no id.

        Raises:
            NotFoundError: the actor has no such workspace.
        """
        actor.require("files:read")
        async with self._store.read() as tx:
            found = (await self._found(tx, actor, reference)).workspace
            return found, await tx.sandboxes.mounting(found.id)

    async def delete(self, actor: Actor, reference: str, *, force: bool = False) -> Workspace:
        """Delete a workspace and its files. With `force`, unmount it from sandboxes first.

        Raises:
            NotFoundError: there is no such workspace.
            ConflictError: it is a member's personal one.
            WorkspaceInUseError: a sandbox has it mounted, and `force` is not set.
        """
        actor.require("files:write")
        async with self._store.write(actor.org_id) as tx:
            found = (await self._found(tx, actor, reference)).workspace
            owner_id = found.owner_user_id or ""
            if found.is_personal and await tx.users.member(found.org_id, owner_id) is not None:
                raise ConflictError(
                    "cannot delete a personal workspace: it stays as long as its member; delete "
                    "the files in it"
                )
            mounting = await tx.sandboxes.mounting(found.id)
            if mounting and not force:
                raise WorkspaceInUseError(
                    f"cannot delete the workspace: {len(mounting)} sandboxes have it mounted; "
                    "delete those first"
                    if len(mounting) > 1
                    else "cannot delete the workspace: a sandbox has it mounted; delete that first"
                )
            await tx.sandboxes.forget_mounts(found.id)
            now = self._clock.now()
            # Its slug is free at once.
            gone = replace(found, slug=f"removed:{found.id}", removed_at=now, updated_at=now)
            await tx.workspaces.replace(gone)
            await tx.storage.close("workspace", found.id, now)
            await tx.activity.append(
                self._line(actor, found, "workspace.deleted", "Workspace deleted")
            )
        with suppress(SandyardError):  # it is being read: retried later
            await self._erase(gone)
        return found

    async def _erase(self, workspace: Workspace) -> None:
        # Whether it was mounted is not asked: a node's report may be late.
        for node in self._nodes.all():
            await node.do(WithdrawWorkspace(workspace.id))
        await self._volumes.remove(workspace.id)
        async with self._store.write(workspace.org_id) as tx:
            await tx.workspaces.erase(workspace.id)

    async def note_use(self, workspace: Workspace, *, has_changed: bool) -> None:
        """Store that a workspace was used, and its current size."""
        now = self._clock.now()
        last = workspace.last_accessed_at
        if not has_changed and last is not None and now - last < _ACCESS:
            return
        size = workspace.size_bytes
        if has_changed:
            size = (await self._volumes.use_of(workspace.id, workspace.quota_bytes)).used_bytes
        async with self._store.write(workspace.org_id) as tx:
            await self._note(tx, workspace, size, accessed=True)

    async def _note(
        self, tx: Transaction, workspace: Workspace, size: int, *, accessed: bool
    ) -> None:
        """Store a workspace's size. It is charged from then on."""
        now = self._clock.now()
        found = await tx.workspaces.find(workspace.org_id, workspace.id)
        if found is None:
            return
        changed = found
        if accessed:
            quota = self._sized(found).quota_bytes
            changed = replace(changed, last_accessed_at=now, quota_bytes=quota)
        if size != found.size_bytes:
            changed = replace(changed, size_bytes=size, updated_at=now)
            await tx.storage.close("workspace", found.id, now)
            if size:
                await tx.storage.open(StoragePeriod("workspace", found.id, found.org_id, size, now))
        if changed != found:
            await tx.workspaces.replace(changed)

    async def run(self) -> None:
        """Measure workspaces and finish interrupted deletions every _BEAT_S; never returns. Of
        several servers, one at a time does. One that fails throughout leaves it to another."""
        while True:
            try:
                if self._rests > 0:
                    self._rests -= 1
                elif await self._has_duty() and not await self.look_around():
                    self._rests = _RESTS
            except SandyardError as error:
                log.warning("cannot measure workspaces: %s; retrying", error.message)
            except Exception:  # a bug here must not end the server
                log.exception("unexpected error while measuring workspaces; retrying")
            await self._clock.sleep(_BEAT_S)

    async def _has_duty(self) -> bool:
        async with self._store.write(Turn.SHARED) as tx:
            return await tx.duties.take(_DUTY, self._server_id, lasts=_DUTY_LASTS)

    async def look_around(self) -> bool:
        """Store the sizes of workspaces that are mounted or were used recently, and resume
        interrupted deletions. Return False if nothing of that could be done.

        Raises:
            UnavailableError: the store does not answer.
        """
        async with self._store.read() as tx:
            every, mounted = await tx.workspaces.every(), await tx.sandboxes.mounted()
        now = self._clock.now()
        done = failed = 0
        # Sizes first: charges depend on them, and removals may have to wait for a node.
        for one in sorted(every, key=lambda one: one.removed_at is not None):
            try:
                if one.removed_at is not None:
                    await self._erase(one)
                elif one.id in mounted or (
                    one.last_accessed_at and now - one.last_accessed_at < 10 * _ACCESS
                ):
                    size = (await self._volumes.use_of(one.id, one.quota_bytes)).used_bytes
                    if size != one.size_bytes:
                        async with self._store.write(one.org_id) as tx:
                            await self._note(tx, one, size, accessed=False)
                else:
                    continue
                done += 1
            except SandyardError as error:
                failed += 1
                log.warning(
                    "cannot measure or remove the workspace %s: %s; retrying", one.id, error.message
                )
                if one.removed_at is not None and isinstance(error, DeadlineExceededError):
                    break  # the others would wait as long
            except Exception:  # the others are handled all the same
                failed += 1
                log.exception("unexpected error in the workspace %s; retrying", one.id)
        await self._volumes.rest()
        return done > 0 or failed == 0

    def _line(self, actor: Actor, workspace: Workspace, event: str, title: str) -> Activity:
        return line(
            event,
            title,
            org_id=workspace.org_id,
            actor=actor,
            resource_id=workspace.id,
            at=self._clock.now(),
            summary=workspace.name,
        )


def _sees(actor: Actor, workspace: Workspace) -> bool:
    return not workspace.is_personal or actor.sees_all or workspace.owner_user_id == actor.user_id
