"""Organizations, users, projects and keys. See core.contracts for the behaviour of each method."""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from typing_extensions import override

from sandyard.server.core.contracts.store import (
    KeyRows,
    OrganizationRows,
    ProjectRows,
    RevokedKeyRows,
    SshKeyRows,
    UserRows,
    WorkspaceRows,
)
from sandyard.server.core.errors import AlreadyExistsError
from sandyard.server.core.records import (
    ApiKey,
    KeyHolder,
    Membership,
    Organization,
    Project,
    RevokedKey,
    SshKey,
    User,
    Workspace,
)
from sandyard.server.core.states import HIDDEN, Status
from sandyard.server.links.sql import tables as t
from sandyard.server.links.sql.prepared import Prepared
from sandyard.server.links.sql.rows import Connection, older

_NOT_STORED = frozenset({"owner_display_name", "owner_email"})


class OrganizationTable(OrganizationRows):
    """See core.contracts.store.OrganizationRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, organization: Organization, project: Project) -> None:
        try:
            await self._connection.execute(insert(t.organizations).values(_plain(organization)))
        except IntegrityError as error:
            raise AlreadyExistsError(
                f"cannot use the slug {organization.slug!r}: another organization has it",
                field="name",
            ) from error
        await self._connection.execute(insert(t.projects).values(vars(project)))
        await self._connection.execute(
            insert(t.accounts).values(
                org_id=organization.id,
                balance_cents=0,
                granted_cents=0,
                used_cents=0,
                carried=0,
            )
        )

    @override
    async def find(self, org_id: str) -> Organization | None:
        return await self._one(t.organizations.c.id == org_id)

    @override
    async def find_external(self, external_id: str) -> Organization | None:
        return await self._one(t.organizations.c.external_id == external_id)

    @override
    async def find_slug(self, slug: str) -> Organization | None:
        return await self._one(t.organizations.c.slug == slug)

    @override
    async def are_several(self) -> bool:
        c = t.organizations.c
        found = await self._connection.execute(
            select(c.id).where(c.id > "").order_by(c.id).limit(2)
        )
        return len(found.all()) > 1

    @override
    async def replace(self, organization: Organization) -> None:
        await self._connection.execute(
            update(t.organizations)
            .where(t.organizations.c.id == organization.id)
            .values(_plain(organization))
        )

    @override
    async def first(self) -> Organization | None:
        c = t.organizations.c
        found = await self._connection.execute(
            select(t.organizations).order_by(c.created_at, c.id).limit(1)
        )
        row = found.mappings().first()
        return None if row is None else Organization(**row)

    @override
    async def every(self) -> list[Organization]:
        c = t.organizations.c
        found = await self._connection.execute(select(t.organizations).order_by(c.created_at, c.id))
        return [Organization(**row) for row in found.mappings()]

    async def _one(self, which: Any) -> Organization | None:
        found = await self._connection.execute(select(t.organizations).where(which))
        row = found.mappings().first()
        return None if row is None else Organization(**row)


class WorkspaceTable(WorkspaceRows):
    """See core.contracts.store.WorkspaceRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, workspace: Workspace) -> bool:
        c = t.workspaces.c
        found = await self._connection.execute(
            select(c.id).where(c.org_id == workspace.org_id, c.slug == workspace.slug)
        )
        if found.first() is not None:
            return False
        await self._connection.execute(insert(t.workspaces).values(vars(workspace)))
        return True

    @override
    async def personal(self, org_id: str, user_id: str) -> Workspace | None:
        c = t.workspaces.c
        found = await self._connection.execute(
            select(t.workspaces).where(
                c.org_id == org_id,
                c.owner_user_id == user_id,
                c.is_personal.is_(True),
                c.removed_at.is_(None),
            )
        )
        row = found.mappings().first()
        return None if row is None else Workspace(**row)

    @override
    async def find(self, org_id: str, reference: str) -> Workspace | None:
        c = t.workspaces.c
        found = await self._where(
            c.org_id == org_id,
            c.removed_at.is_(None),
            or_(c.id == reference, c.slug == reference),
        )
        # A name may look like another's id.
        return min(found, key=lambda one: one.id != reference, default=None)

    @override
    async def of(self, org_id: str) -> list[Workspace]:
        c = t.workspaces.c
        return await self._where(c.org_id == org_id, c.removed_at.is_(None))

    @override
    async def replace(self, workspace: Workspace) -> None:
        values = {name: value for name, value in vars(workspace).items() if name != "id"}
        await self._connection.execute(
            update(t.workspaces).where(t.workspaces.c.id == workspace.id).values(values)
        )

    @override
    async def erase(self, workspace_id: str) -> None:
        await self._connection.execute(
            delete(t.workspaces).where(t.workspaces.c.id == workspace_id)
        )

    @override
    async def every(self) -> list[Workspace]:
        return await self._where()

    async def _where(self, *wanted: ColumnElement[bool]) -> list[Workspace]:
        c = t.workspaces.c
        found = await self._connection.execute(
            select(t.workspaces).where(*wanted).order_by(c.created_at.desc(), c.id)
        )
        return [Workspace(**row) for row in found.mappings()]


class UserTable(UserRows):
    """See core.contracts.store.UserRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, user: User) -> None:
        try:
            await self._connection.execute(insert(t.users).values(vars(user)))
        except IntegrityError as error:
            raise _user_exists(user) from error

    @override
    async def find(
        self,
        *,
        user_id: str | None = None,
        external_id: str | None = None,
        email: str | None = None,
    ) -> User | None:
        c = t.users.c
        for column, value in ((c.id, user_id), (c.external_id, external_id), (c.email, email)):
            if value is not None:
                found = await self._connection.execute(select(t.users).where(column == value))
                row = found.mappings().first()
                return None if row is None else User(**row)
        return None

    @override
    async def replace(self, user: User) -> None:
        try:
            await self._connection.execute(
                update(t.users).where(t.users.c.id == user.id).values(vars(user))
            )
        except IntegrityError as error:
            raise _user_exists(user) from error

    @override
    async def put_member(self, membership: Membership) -> None:
        c = t.memberships.c
        which = and_(c.org_id == membership.org_id, c.user_id == membership.user_id)
        done = await self._connection.execute(
            update(t.memberships)
            .where(which)
            .values(role=membership.role, role_at=membership.role_at)
        )
        if done.rowcount == 0:
            await self._connection.execute(insert(t.memberships).values(vars(membership)))

    @override
    async def remove_member(self, org_id: str, user_id: str, at: datetime) -> bool:
        c, f = t.memberships.c, t.former_members.c
        done = await self._connection.execute(
            delete(t.memberships).where(c.org_id == org_id, c.user_id == user_id)
        )
        await self._connection.execute(
            delete(t.former_members).where(f.org_id == org_id, f.user_id == user_id)
        )
        await self._connection.execute(
            insert(t.former_members).values(org_id=org_id, user_id=user_id, removed_at=at)
        )
        return done.rowcount > 0

    @override
    async def removed_at(self, org_id: str, user_id: str) -> datetime | None:
        c = t.former_members.c
        found = await self._connection.execute(
            select(c.removed_at).where(c.org_id == org_id, c.user_id == user_id)
        )
        row = found.first()
        return None if row is None else row.removed_at

    @override
    async def member(self, org_id: str, user_id: str) -> Membership | None:
        c = t.memberships.c
        found = await self._connection.execute(
            select(t.memberships).where(c.org_id == org_id, c.user_id == user_id)
        )
        row = found.mappings().first()
        return None if row is None else Membership(**row)

    @override
    async def without_workspace(self) -> list[tuple[User, Membership]]:
        m, w = t.memberships.c, t.workspaces.c
        own = select(w.id).where(
            w.org_id == m.org_id,
            w.owner_user_id == m.user_id,
            w.is_personal.is_(True),
            w.removed_at.is_(None),
        )
        return await self._members(~own.exists())

    @override
    async def members(self, org_id: str) -> list[tuple[User, Membership]]:
        return await self._members(t.memberships.c.org_id == org_id)

    async def _members(self, wanted: ColumnElement[bool]) -> list[tuple[User, Membership]]:
        m = t.memberships.c
        found = await self._connection.execute(
            select(t.users, m.org_id, m.role, m.created_at.label("joined_at"), m.role_at)
            .join(t.memberships, m.user_id == t.users.c.id)
            .where(wanted)
            .order_by(m.created_at, t.users.c.id)
        )
        result = []
        for row in found.mappings():
            values = dict(row)
            org_id = values.pop("org_id")
            role, joined, set_at = (values.pop(one) for one in ("role", "joined_at", "role_at"))
            user = User(**values)
            result.append((user, Membership(org_id, user.id, role, joined, set_at)))
        return result

    @override
    async def organizations_of(self, user_id: str) -> list[tuple[Organization, Membership]]:
        m = t.memberships.c
        found = await self._connection.execute(
            select(t.organizations, m.role, m.created_at.label("joined_at"), m.role_at)
            .join(t.memberships, m.org_id == t.organizations.c.id)
            .where(m.user_id == user_id)
            .order_by(m.created_at, t.organizations.c.created_at, t.organizations.c.id)
        )
        result = []
        for row in found.mappings():
            values = dict(row)
            role, joined, set_at = (values.pop(one) for one in ("role", "joined_at", "role_at"))
            organization = Organization(**values)
            result.append(
                (organization, Membership(organization.id, user_id, role, joined, set_at))
            )
        return result


class ProjectTable(ProjectRows):
    """See core.contracts.store.ProjectRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, project: Project) -> None:
        try:
            await self._connection.execute(insert(t.projects).values(vars(project)))
        except IntegrityError as error:
            raise AlreadyExistsError(
                f"cannot use the slug {project.slug!r}: another project has it", field="slug"
            ) from error

    @override
    async def find(self, org_id: str, project_id: str | None) -> Project | None:
        if project_id is None:
            found = await self._connection.fetch(_DEFAULT_PROJECT, {"wanted_org": org_id})
        else:
            wanted = {"wanted_org": org_id, "wanted_id": project_id}
            found = await self._connection.fetch(_PROJECT, wanted)
        return Project(**found[0]) if found else None

    @override
    async def every(self, org_id: str) -> list[Project]:
        c = t.projects.c
        found = await self._connection.execute(
            select(t.projects)
            .where(c.org_id == org_id)
            .order_by(c.is_default.desc(), c.created_at.desc(), c.id)
        )
        return [Project(**row) for row in found.mappings()]

    @override
    async def replace(self, project: Project) -> None:
        await self._connection.execute(
            update(t.projects).where(t.projects.c.id == project.id).values(vars(project))
        )

    @override
    async def remove(self, project: Project, *, heir: Project) -> None:
        # A later version, so that a concurrent change does not restore the old project.
        c = t.sandboxes.c
        await self._connection.execute(
            update(t.sandboxes)
            .where(c.project_id == project.id)
            .values(project_id=heir.id, version=c.version + 1)
        )
        await self._connection.execute(
            update(t.api_keys)
            .where(t.api_keys.c.project_id == project.id)
            .values(project_id=heir.id)
        )
        await self._connection.execute(delete(t.projects).where(t.projects.c.id == project.id))


class KeyTable(KeyRows):
    """See core.contracts.store.KeyRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, key: ApiKey) -> None:
        await self._connection.execute(insert(t.api_keys).values(_values(key)))

    @override
    async def find(self, org_id: str, key_id: str) -> ApiKey | None:
        c = t.api_keys.c
        found = await self._connection.execute(_keys().where(c.org_id == org_id, c.id == key_id))
        row = found.mappings().first()
        return None if row is None else _key(row)

    @override
    async def holder(self, digest: str) -> KeyHolder | None:
        found = await self._connection.fetch(_HOLDER, {"wanted_digest": digest})
        if not found:
            return None
        values = found[0]
        role, is_operator = values.pop("role"), bool(values.pop("is_operator"))
        plan, limits = values.pop("plan"), values.pop("limits")
        return KeyHolder(_key(values), role, is_operator, plan, limits)

    @override
    async def replace(self, key: ApiKey) -> None:
        values = _values(key)
        del values["last_used_at"]  # written by `touch` only
        await self._connection.execute(
            update(t.api_keys).where(t.api_keys.c.id == key.id).values(values)
        )

    @override
    async def page(
        self,
        org_id: str,
        *,
        owner_user_id: str | None,
        limit: int,
        after: tuple[datetime, str] | None = None,
    ) -> list[ApiKey]:
        c = t.api_keys.c
        wanted = [c.org_id == org_id, c.revoked_at.is_(None)]
        if owner_user_id is not None:
            wanted.append(c.owner_user_id == owner_user_id)
        if after is not None:
            wanted.append(older(c, after))
        found = await self._connection.execute(
            _keys().where(*wanted).order_by(c.created_at.desc(), c.id.desc()).limit(limit)
        )
        return [_key(row) for row in found.mappings()]

    @override
    async def touch(self, key_id: str, at: datetime) -> None:
        await self._connection.execute(
            update(t.api_keys).where(t.api_keys.c.id == key_id).values(last_used_at=at)
        )


class SshKeyTable(SshKeyRows):
    """See core.contracts.store.SshKeyRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, key: SshKey) -> None:
        try:
            await self._connection.execute(insert(t.ssh_keys).values(vars(key)))
        except IntegrityError as error:
            raise AlreadyExistsError(
                f"cannot add this key: the organization has it already ({key.fingerprint})",
                field="public_key",
            ) from error

    @override
    async def find(self, org_id: str, key_id: str) -> SshKey | None:
        c = t.ssh_keys.c
        found = await self._connection.execute(
            select(t.ssh_keys).where(c.org_id == org_id, c.id == key_id)
        )
        row = found.mappings().first()
        return None if row is None else SshKey(**row)

    @override
    async def every(self, org_id: str) -> list[SshKey]:
        found = await self._connection.fetch(_SSH_KEYS, {"wanted_org": org_id})
        return [SshKey(**row) for row in found]

    @override
    async def touch(self, key_id: str, at: datetime) -> None:
        await self._connection.execute(
            update(t.ssh_keys).where(t.ssh_keys.c.id == key_id).values(last_used_at=at)
        )

    @override
    async def remove(self, org_id: str, key_id: str) -> bool:
        c = t.ssh_keys.c
        done = await self._connection.execute(
            delete(t.ssh_keys).where(c.org_id == org_id, c.id == key_id)
        )
        return done.rowcount > 0


class RevokedKeyTable(RevokedKeyRows):
    """See core.contracts.store.RevokedKeyRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, sandbox_id: str, key: SshKey) -> None:
        c = t.revoked_keys.c
        await self._connection.execute(
            delete(t.revoked_keys).where(
                c.sandbox_id == sandbox_id, c.fingerprint == key.fingerprint
            )
        )
        await self._connection.execute(
            insert(t.revoked_keys).values(
                sandbox_id=sandbox_id, fingerprint=key.fingerprint, public_key=key.public_key
            )
        )

    @override
    async def pending(self) -> list[RevokedKey]:
        c, box = t.revoked_keys.c, t.sandboxes.c
        found = await self._connection.execute(
            select(
                c.sandbox_id, c.fingerprint, c.public_key, box.org_id, box.node_id,
                box.incarnation, box.started_at,
            )
            .join(t.sandboxes, box.id == c.sandbox_id)
            .where(
                t.is_any_of([Status.RUNNING]),
                box.started_at.is_not(None),
                or_(c.removed_of.is_(None), c.removed_of != box.started_at),
            )
            .order_by(c.sandbox_id, c.fingerprint)
        )  # fmt: skip
        return [RevokedKey(**row) for row in found.mappings()]

    @override
    async def removed(self, key: RevokedKey) -> None:
        c = t.revoked_keys.c
        await self._connection.execute(
            update(t.revoked_keys)
            .where(c.sandbox_id == key.sandbox_id, c.fingerprint == key.fingerprint)
            .values(removed_of=key.started_at)
        )

    @override
    async def clear(self) -> None:
        box = t.sandboxes.c
        gone = select(box.id).where(t.is_any_of(sorted(HIDDEN)))
        await self._connection.execute(
            delete(t.revoked_keys).where(t.revoked_keys.c.sandbox_id.in_(gone))
        )


def _plain(organization: Organization) -> dict[str, object]:
    return vars(organization) | {
        "settings": dict(organization.settings),
        "limits": dict(organization.limits),
    }


def _user_exists(user: User) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"cannot use the e-mail address {user.email!r}: another user has it", field="email"
    )


def _values(key: ApiKey) -> dict[str, Any]:
    values = {name: value for name, value in vars(key).items() if name not in _NOT_STORED}
    return values | {"scopes": list(key.scopes)}


def _key(row: Any) -> ApiKey:
    return ApiKey(**{**row, "scopes": tuple(row["scopes"])})


def _keys(*more: Any) -> Any:
    return select(
        t.api_keys,
        t.users.c.display_name.label("owner_display_name"),
        t.users.c.email.label("owner_email"),
        *more,
    ).join(t.users, t.users.c.id == t.api_keys.c.owner_user_id)


# Built once: every request runs them, and to build a statement takes longer than to run it.
_PROJECTS = select(t.projects).where(t.projects.c.org_id == bindparam("wanted_org"))
_DEFAULT_PROJECT = Prepared(_PROJECTS.where(t.projects.c.is_default.is_(True)))
_PROJECT = Prepared(_PROJECTS.where(t.projects.c.id == bindparam("wanted_id")))
_SSH_KEYS = Prepared(
    select(t.ssh_keys)
    .where(t.ssh_keys.c.org_id == bindparam("wanted_org"))
    .order_by(t.ssh_keys.c.created_at.desc(), t.ssh_keys.c.id.desc())
)
_HOLDER = Prepared(
    _keys(
        t.memberships.c.role,
        t.users.c.is_operator,
        t.organizations.c.plan,
        t.organizations.c.limits,
    )
    .join(t.organizations, t.organizations.c.id == t.api_keys.c.org_id)
    .join(
        t.memberships,
        and_(
            t.memberships.c.org_id == t.api_keys.c.org_id,
            t.memberships.c.user_id == t.api_keys.c.owner_user_id,
        ),
    )
    .where(t.api_keys.c.digest == bindparam("wanted_digest"))
)
