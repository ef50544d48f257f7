"""Organizations, their members and projects."""

import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
)
from sandyard.server.core.ids import PERSONAL, check_slug, checked_text, new_uuid, slug_of
from sandyard.server.core.records import (
    Membership,
    Organization,
    Project,
    Role,
    User,
    Workspace,
)
from sandyard.server.core.scopes import ADMINS_ONLY
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.money.credits import SIGN_UP, credit
from sandyard.server.service.repeats import Repeatable, Repeats

ROLES: Final[tuple[Role, ...]] = ("admin", "member")
_NAME_MAX = 100
COLOR = "^#[0-9a-fA-F]{6}$"
_PROJECTS_MAX = 1000


@dataclass(frozen=True)
class SignUp:
    """What new organizations start with, and how many a user may create."""

    grant_cents: int
    plan: str
    organizations_max: int


@dataclass(frozen=True)
class Founded:
    """A new organization, and what was created with it."""

    organization: Organization
    project: Project
    workspace: Workspace


async def found_organization(
    tx: Transaction,
    name: str,
    founder: User,
    *,
    sign_up: SignUp,
    at: datetime,
    role: Role = "admin",
    external_id: str | None = None,
    is_granted: bool = True,
    slug: str | None = None,
    actor: Actor | None = None,
) -> Founded:
    """Create an organization with its default project, its first member and their workspace."""
    org_id = new_uuid()
    organization = Organization(
        id=org_id,
        name=name,
        slug=slug or slug_of(name, org_id),
        created_at=at,
        plan=sign_up.plan,
        external_id=external_id,
    )
    project = Project(new_uuid(), org_id, "Default", "default", True, at)
    await tx.organizations.add(organization, project)
    workspace = await join(tx, org_id, founder, role, at=at)
    if is_granted and sign_up.grant_cents > 0:
        await credit(
            tx,
            org_id,
            "grant",
            sign_up.grant_cents,
            description="Sign-up credits",
            at=at,
            reference_id=SIGN_UP,
        )
    await tx.activity.append(
        line(
            "organization.created",
            "Organization created",
            org_id=org_id,
            actor=actor,
            resource_id=org_id,
            at=at,
            summary=name,
        )
    )
    return Founded(organization, project, workspace)


async def join(tx: Transaction, org_id: str, user: User, role: Role, *, at: datetime) -> Workspace:
    """Add a user to an organization, and return their personal workspace in it."""
    await tx.users.put_member(Membership(org_id, user.id, role, created_at=at, role_at=at))
    known = await tx.workspaces.personal(org_id, user.id)
    if known is not None:
        return known
    workspace_id = new_uuid()
    workspace = Workspace(
        workspace_id, org_id, user.id, f"{PERSONAL}{user.id}", "Personal", True, at, at
    )
    if not await tx.workspaces.add(workspace):  # another has taken its slug
        workspace = replace(workspace, slug=f"{PERSONAL}{workspace_id}")
        await tx.workspaces.add(workspace)
    return workspace


async def revoke_all(
    tx: Transaction,
    member: Membership,
    *,
    at: datetime,
    actor: Actor | None = None,
    only_admins: bool = False,
) -> None:
    """Revoke a member's API keys, or only those with admin scopes."""
    for key in await tx.keys.page(member.org_id, owner_user_id=member.user_id, limit=10_000):
        if only_admins and ADMINS_ONLY.isdisjoint(key.scopes):
            continue
        await tx.keys.replace(replace(key, revoked_at=at))
        await tx.activity.append(
            line(
                "api_key.revoked",
                "API key revoked",
                org_id=member.org_id,
                actor=actor,
                resource_id=key.id,
                at=at,
                summary=key.name,
            )
        )


async def set_role(
    tx: Transaction, member: Membership, role: Role, *, actor: Actor | None, at: datetime
) -> None:
    """Change a member's role. A former admin loses keys with admin scopes."""
    await tx.users.put_member(replace(member, role=role, role_at=at))
    if role != "admin":
        await revoke_all(tx, member, at=at, actor=actor, only_admins=True)
    await tx.activity.append(
        line(
            "member.role_changed",
            f"Member is {role} now",
            org_id=member.org_id,
            actor=actor,
            resource_id=member.user_id,
            at=at,
            attributes={"role": role, "was": member.role},
        )
    )


class Organizations:
    """The operations. Each takes the actor and never discloses another organization's data."""

    def __init__(self, *, store: Store, repeats: Repeats, clock: Clock, sign_up: SignUp) -> None:
        self._store = store
        self._repeats = repeats
        self._clock = clock
        self._sign_up = sign_up

    async def me(self, actor: Actor) -> User:
        """Return the user behind the credential."""
        async with self._store.read() as tx:
            user = await tx.users.find(user_id=actor.user_id)
        if user is None:
            raise NotFoundError("cannot find the user behind this credential")
        return user

    async def get(self, actor: Actor, org_id: str | None = None) -> tuple[Organization, str]:
        """Return an organization of the actor's, the current one for None, and the actor's role.

        Raises:
            NotFoundError: it does not exist, or the actor is not a member.
        """
        actor.require("org:read")
        return await self._found(actor, org_id)

    async def _found(self, actor: Actor, org_id: str | None) -> tuple[Organization, str]:
        async with self._store.read() as tx:
            if org_id is None or org_id == actor.org_id:
                organization = await tx.organizations.find(actor.org_id)
                role: Role | None = actor.role
            else:
                organization, role = None, None
                # A key is for one organization; a session is its user, who may be in several.
                if not actor.is_bound:
                    organization = await tx.organizations.find(org_id)
                    member = await tx.users.member(org_id, actor.user_id)
                    role = member.role if member else None
        if organization is None or role is None:
            raise NotFoundError("cannot find the organization: check its id")
        return organization, role

    async def create(
        self, actor: Actor, name: str, *, request: Repeatable | None = None
    ) -> Founded:
        """Create an organization with the actor's user as its first admin.

        Raises:
            InvalidArgumentError: the name is invalid.
            ConflictError: the user belongs to too many.
        """
        actor.require("org:write")
        name = check_title(name, field="name")
        async with self._repeats.turn(actor, request), self._store.write(Turn.ALONE) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            if ids is not None:
                return await _made(tx, actor, ids[0])
            user = await tx.users.find(user_id=actor.user_id)
            if user is None:
                raise NotFoundError("cannot find the user behind this credential")
            theirs = await tx.users.organizations_of(user.id)
            if len(theirs) >= self._sign_up.organizations_max:
                raise ConflictError(
                    f"cannot make another organization: a user may belong to "
                    f"{self._sign_up.organizations_max} (setting accounts.organizations_per_user)",
                    limit=self._sign_up.organizations_max,
                )
            founded = await found_organization(
                tx,
                name,
                user,
                sign_up=self._sign_up,
                at=self._clock.now(),
                is_granted=not theirs,
                actor=actor,
            )
            await self._repeats.note(tx, actor, request, (founded.organization.id,))
            return founded

    async def members(self, actor: Actor, org_id: str) -> list[tuple[User, Membership]]:
        """Return an organization's members, longest-standing first.

        Raises:
            NotFoundError: see `get`.
        """
        actor.require("org:members")
        organization, _ = await self._found(actor, org_id)
        async with self._store.read() as tx:
            return await tx.users.members(organization.id)

    # --- projects ---------------------------------------------------------------------------

    async def projects(self, actor: Actor) -> list[Project]:
        """Return the organization's projects, the default one first."""
        actor.require("org:read")
        async with self._store.read() as tx:
            return await tx.projects.every(actor.org_id)

    async def project(self, actor: Actor, project_id: str) -> Project:
        """Return a project.

        Raises:
            NotFoundError: it does not exist, or belongs to another organization.
        """
        actor.require("org:read")
        async with self._store.read() as tx:
            return await _project(tx, actor, project_id)

    async def create_project(
        self,
        actor: Actor,
        name: str,
        *,
        slug: str | None = None,
        color: str | None = None,
        request: Repeatable | None = None,
    ) -> Project:
        """Create a project.

        Raises:
            InvalidArgumentError: name, slug or color is invalid.
            AlreadyExistsError: the slug is taken.
        """
        actor.require("org:write")
        project_id = new_uuid()
        project = Project(
            id=project_id,
            org_id=actor.org_id,
            name=check_title(name, field="name"),
            slug=slug_of(name, project_id) if slug is None else check_slug(slug),
            is_default=False,
            created_at=self._clock.now(),
        )
        if color is not None:
            project = replace(project, color=_check_color(color))
        async with self._repeats.turn(actor, request), self._store.write(actor.org_id) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            if ids is not None:
                return await _project(tx, actor, ids[0])
            if len(await tx.projects.every(actor.org_id)) >= _PROJECTS_MAX:
                raise ConflictError(
                    f"cannot make another project: an organization has {_PROJECTS_MAX} at most"
                )
            await tx.projects.add(project)
            await self._note(tx, actor, project, "project.created", "Project created")
            await self._repeats.note(tx, actor, request, (project.id,))
        return project

    async def change_project(
        self, actor: Actor, project_id: str, *, name: str | None, color: str | None
    ) -> Project:
        """Change a project's name or color.

        Raises:
            InvalidArgumentError: a value is invalid.
            NotFoundError: see `project`.
        """
        actor.require("org:write")
        async with self._store.write(actor.org_id) as tx:
            project = await _project(tx, actor, project_id)
            if name is not None:
                project = replace(project, name=check_title(name, field="name"))
            if color is not None:
                project = replace(project, color=_check_color(color))
            await tx.projects.replace(project)
            await self._note(tx, actor, project, "project.updated", "Project changed")
        return project

    async def delete_project(self, actor: Actor, project_id: str) -> Project:
        """Delete a project. Its contents move to the default project.

        Raises:
            ConflictError: it is the default project.
            NotFoundError: see `project`.
        """
        actor.require("org:write")
        async with self._store.write(actor.org_id) as tx:
            project = await _project(tx, actor, project_id)
            if project.is_default:
                raise ConflictError(
                    "cannot delete the default project: new sandboxes are put into it"
                )
            heir = await tx.projects.find(actor.org_id, None)
            if heir is None:
                raise NotFoundError("cannot find the default project")
            await tx.projects.remove(project, heir=heir)
            await self._note(tx, actor, project, "project.deleted", "Project deleted")
        return project

    async def _note(
        self, tx: Transaction, actor: Actor, project: Project, event: str, title: str
    ) -> None:
        await tx.activity.append(
            line(
                event,
                title,
                org_id=actor.org_id,
                actor=actor,
                resource_id=project.id,
                at=self._clock.now(),
                summary=project.name,
            )
        )


def check_title(name: str, *, field: str) -> str:
    """Return a display name.

    Raises:
        InvalidArgumentError: it is not 1 to 100 printable characters.
    """
    checked_text(name, field=field)
    if not 1 <= len(name) <= _NAME_MAX or not name.isprintable() or not name.strip():
        raise InvalidArgumentError(
            f"cannot use this {{field}}: it needs 1 to {_NAME_MAX} printable characters",
            field=field,
        )
    return name


async def _project(tx: Transaction, actor: Actor, project_id: str) -> Project:
    project = await tx.projects.find(actor.org_id, project_id)
    if project is None:
        raise NotFoundError("cannot find the project: check its id")
    return project


async def _made(tx: Transaction, actor: Actor, org_id: str) -> Founded:
    organization = await tx.organizations.find(org_id)
    project = await tx.projects.find(org_id, None)
    workspace = await tx.workspaces.personal(org_id, actor.user_id)
    if organization is None or project is None or workspace is None:
        raise NotFoundError("cannot find the organization that was created")
    return Founded(organization, project, workspace)


def _check_color(color: str) -> str:
    if not re.fullmatch(COLOR, color):
        raise InvalidArgumentError(
            "cannot use this color: expected something like #3b82f6", field="color"
        )
    return color
