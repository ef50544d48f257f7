"""Templates of organizations, their versions and builds, and uploads. See core.contracts for the
behaviour of each method."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    and_,
    cast,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from typing_extensions import override

from sandyard.server.core.codec import decode, encode
from sandyard.server.core.contracts.node import version_name
from sandyard.server.core.contracts.store import (
    BuildRows,
    CredentialRows,
    OrgSecretRows,
    TemplateRows,
    UploadRows,
    VersionRows,
)
from sandyard.server.core.errors import AlreadyExistsError
from sandyard.server.core.records import (
    Build,
    BuildLine,
    BuildStatus,
    Kept,
    RegistryCredential,
    Secret,
    Template,
    TemplateVersion,
    Upload,
    VersionAbout,
    VersionKey,
)
from sandyard.server.links.sql import tables as t
from sandyard.server.links.sql.rows import Connection
from sandyard.server.links.sql.seal import Seal

# A plan may have megabytes, and is needed only to carry the build out.
_BUILD = tuple(one for one in t.builds.c if one.name != "plan_sealed")


class TemplateTable(TemplateRows):
    """See core.contracts.store.TemplateRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def put(self, template: Template) -> None:
        values = vars(template) | {"tags": dict(template.tags)}
        done = await self._connection.execute(
            update(t.templates)
            .where(*_of(t.templates, template.org_id, template.slug))
            .values(values)
        )
        if done.rowcount == 0:
            await self._connection.execute(insert(t.templates).values(values))

    @override
    async def find(self, org_id: str, slug: str) -> Template | None:
        found = await self._connection.execute(
            select(t.templates).where(*_of(t.templates, org_id, slug))
        )
        row = found.mappings().first()
        return None if row is None else Template(**row)

    @override
    async def of(self, org_id: str) -> list[Template]:
        c = t.templates.c
        found = await self._connection.execute(
            select(t.templates).where(c.org_id == org_id).order_by(c.slug)
        )
        return [Template(**row) for row in found.mappings()]

    @override
    async def remove(self, org_id: str, slug: str, *, at: datetime) -> bool:
        versions = t.template_versions
        await self._connection.execute(
            update(versions)
            .where(*_of(versions, org_id, slug), versions.c.removed_at.is_(None))
            .values(removed_at=at)
        )
        its = _of(t.builds, org_id, slug)
        builds = select(t.builds.c.id).where(*its)
        await self._connection.execute(
            delete(t.build_lines).where(t.build_lines.c.build_id.in_(builds))
        )
        await self._connection.execute(
            delete(t.builds).where(*its, t.builds.c.ended_at.is_not(None))
        )
        done = await self._connection.execute(
            delete(t.templates).where(*_of(t.templates, org_id, slug))
        )
        return done.rowcount > 0


class VersionTable(VersionRows):
    """See core.contracts.store.VersionRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    @override
    async def add(self, version: TemplateVersion) -> None:
        values = vars(version) | {"source": dict(version.source)}
        values["about_sealed"] = self._seal.close(
            {"about": json.dumps(encode(values.pop("about")))}
        )
        await self._connection.execute(insert(t.template_versions).values(values))

    @override
    async def of(self, org_id: str, slug: str) -> list[TemplateVersion]:
        c = t.template_versions.c
        return await self._where(
            *_of(t.template_versions, org_id, slug), c.removed_at.is_(None), order=c.number.desc()
        )

    @override
    async def kept(self, org_id: str) -> Kept:
        c = t.template_versions.c
        return await _kept(
            self._connection, c.size_bytes, c.org_id == org_id, c.removed_at.is_(None)
        )

    @override
    async def remove(self, version: TemplateVersion, *, at: datetime) -> bool:
        c = t.template_versions.c
        done = await self._connection.execute(
            update(t.template_versions)
            .where(c.build_id == version.build_id, c.removed_at.is_(None))
            .values(removed_at=at)
        )
        return done.rowcount > 0

    @override
    async def every(self) -> list[VersionKey]:
        c = t.template_versions.c
        found = await self._connection.execute(
            select(c.org_id, c.slug, c.digest)
            .where(c.removed_at.is_(None))
            .order_by(c.created_at, c.digest)
        )
        return [VersionKey(row.org_id, row.slug, row.digest) for row in found]

    @override
    async def removed(self) -> list[TemplateVersion]:
        c = t.template_versions.c
        return await self._where(c.removed_at.is_not(None), order=c.removed_at)

    @override
    async def is_kept(self, version: TemplateVersion | VersionKey) -> bool:
        c = t.template_versions.c
        found = await self._connection.execute(
            select(c.build_id)
            .where(
                c.org_id == version.org_id,
                c.slug == version.slug,
                c.digest == version.digest,
                c.removed_at.is_(None),
            )
            .limit(1)
        )
        return found.first() is not None

    @override
    async def is_used(self, version: TemplateVersion) -> bool:
        name = version_name(version.slug, version.digest)
        live = and_(t.sandboxes.c.org_id == version.org_id, text(t.LIVE))
        for wanted in (
            select(t.sandboxes.c.id).where(live, t.sandboxes.c.template == name),
            select(t.snapshots.c.id).where(
                t.snapshots.c.org_id == version.org_id, t.snapshots.c.template == name
            ),
        ):
            if (await self._connection.execute(wanted.limit(1))).first() is not None:
                return True
        return False

    @override
    async def about(self, org_id: str, slug: str, digest: str) -> VersionAbout | None:
        c = t.template_versions.c
        found = await self._connection.execute(
            select(c.about_sealed)
            .where(*_of(t.template_versions, org_id, slug), c.digest == digest)
            .limit(1)
        )
        row = found.first()
        return None if row is None else self._about(row.about_sealed)

    def _about(self, sealed: str) -> VersionAbout:
        return decode(VersionAbout, json.loads(self._seal.open(sealed)["about"]))

    @override
    async def forget(self, version: TemplateVersion) -> None:
        c = t.template_versions.c
        await self._connection.execute(
            delete(t.template_versions).where(
                c.build_id == version.build_id, c.removed_at.is_not(None)
            )
        )

    async def _where(self, *which: ColumnElement[bool], order: Any) -> list[TemplateVersion]:
        found = await self._connection.execute(
            select(t.template_versions).where(*which).order_by(order)
        )
        versions = []
        for row in found.mappings():
            values = dict(row)
            about = self._about(values.pop("about_sealed"))
            versions.append(TemplateVersion(**values, about=about))
        return versions


class BuildTable(BuildRows):
    """See core.contracts.store.BuildRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    @override
    async def add(self, build: Build) -> None:
        values = self._values(build) | self._planned(build.plan)
        await self._connection.execute(insert(t.builds).values(values))

    @override
    async def find(self, org_id: str, build_id: str) -> Build | None:
        c = t.builds.c
        found = await self._builds(select(*_BUILD).where(c.id == build_id, c.org_id == org_id))
        return found[0] if found else None

    @override
    async def page(self, org_id: str, slug: str, *, limit: int) -> list[Build]:
        c = t.builds.c
        return await self._builds(
            select(*_BUILD)
            .where(*_of(t.builds, org_id, slug))
            .order_by(c.created_at.desc(), c.id.desc())
            .limit(limit)
        )

    @override
    async def count(self, org_id: str, *statuses: BuildStatus) -> int:
        c = t.builds.c
        found = await self._connection.execute(
            select(func.count()).where(
                c.org_id == org_id,
                c.ended_at.is_(None),
                c.status.in_([one.value for one in statuses]),
            )
        )
        return int(found.scalar_one())

    @override
    async def waiting(self, org_id: str, build_id: str) -> Build | None:
        c = t.builds.c
        found = await self._builds(
            select(t.builds).where(c.id == build_id, c.org_id == org_id, _is_waiting())
        )
        return found[0] if found else None

    @override
    async def describe(self, build: Build) -> bool:
        done = await self._connection.execute(
            update(t.builds)
            .where(t.builds.c.id == build.id, _is_waiting())
            .values(self._values(build) | self._planned(build.plan))
        )
        return done.rowcount > 0

    @override
    async def claim(self, server_id: str, *, lease: str, lasts: timedelta) -> Build | None:
        c, other = t.builds.c, t.builds.alias("other").c
        is_free = or_(c.lease_until.is_(None), c.lease_until < t.now())
        in_progress = (
            select(func.count())
            .where(
                other.org_id == c.org_id,
                other.ended_at.is_(None),
                # One whose server has gone must not keep others from beginning.
                other.lease_until >= t.now(),
            )
            .scalar_subquery()
        )
        waiting = (
            select(c.id)
            .where(
                c.ended_at.is_(None),
                c.status != BuildStatus.WAITING.value,
                is_free,
                or_(c.server_id.is_(None), c.server_id == server_id),
                # One that has begun goes on.
                or_(
                    c.at_once.is_(None),
                    c.started_at.is_not(None),
                    c.lease_token.is_not(None),
                    in_progress < c.at_once,
                ),
            )
            .order_by(c.created_at, c.id)
            .limit(1)
        )
        # Looked at once more: another server may have been faster.
        return await self._taken(
            update(t.builds)
            .where(c.id == waiting.scalar_subquery(), c.ended_at.is_(None), is_free)
            .values(lease_token=lease, lease_until=_until(lasts)),
            *t.builds.c,
        )

    @override
    async def place(self, build: Build) -> int:
        c = t.builds.c
        before = or_(
            c.created_at < build.created_at,
            and_(c.created_at == build.created_at, c.id < build.id),
        )
        found = await self._connection.execute(
            select(func.count()).where(
                c.org_id == build.org_id,
                c.ended_at.is_(None),
                c.status == BuildStatus.QUEUED.value,
                before,
            )
        )
        return int(found.scalar_one()) + 1

    @override
    async def save(self, build: Build, *, lease: str, lasts: timedelta | None) -> Build | None:
        c = t.builds.c
        values = self._values(build)
        del values["is_cancelled"]
        if build.ended_at is not None:
            values |= self._planned({})
        token = None if lasts is None else lease
        until = None if lasts is None else _until(lasts)
        return await self._taken(
            update(t.builds)
            .where(c.id == build.id, c.lease_token == lease)
            .values(**values, lease_token=token, lease_until=until),
            *_BUILD,
        )

    @override
    async def cancel(self, org_id: str, build_id: str, *, at: datetime) -> bool:
        c = t.builds.c
        which = (c.id == build_id, c.org_id == org_id, c.ended_at.is_(None))
        done = await self._connection.execute(
            update(t.builds).where(*which).values(is_cancelled=True)
        )
        # No server has started it.
        await self._connection.execute(
            update(t.builds)
            .where(*which, c.lease_until.is_(None), c.started_at.is_(None))
            .values(
                status=BuildStatus.CANCELLED.value,
                ended_at=at,
                error="it was cancelled",
                **self._planned({}),
            )
        )
        return done.rowcount > 0

    @override
    async def give_up(self, *, before: datetime, at: datetime, error: str) -> list[Build]:
        c = t.builds.c
        return await self._builds(
            update(t.builds)
            .where(
                c.ended_at.is_(None),
                c.server_id.is_not(None),
                c.created_at < before,
                or_(c.lease_until.is_(None), c.lease_until < t.now()),
            )
            .values(
                status=BuildStatus.FAILED.value,
                ended_at=at,
                error=error,
                **self._planned({}),
            )
            .returning(*_BUILD)
        )

    @override
    async def expire(self, *, before: datetime, at: datetime, error: str) -> None:
        await self._connection.execute(
            update(t.builds)
            .where(_is_waiting(), t.builds.c.created_at < before)
            .values(status=BuildStatus.FAILED.value, ended_at=at, error=error, **self._planned({}))
        )

    @override
    async def prune(self, org_id: str, slug: str, *, keep: int, keep_logs: int) -> None:
        c, v, lines = t.builds.c, t.template_versions.c, t.build_lines
        ended = (*_of(t.builds, org_id, slug), c.ended_at.is_not(None))
        found = await self._connection.execute(
            select(c.id).where(*ended).order_by(c.created_at.desc(), c.id.desc())
        )
        every = [str(one) for one in found.scalars()]
        for build_id in every[keep_logs:]:
            await self._connection.execute(delete(lines).where(lines.c.build_id == build_id))
        for build_id in every[keep:]:
            has_version = exists().where(v.build_id == build_id, v.removed_at.is_(None))
            await self._connection.execute(delete(t.builds).where(c.id == build_id, ~has_version))
        emptied = c.id.in_(every[keep_logs:])
        await self._connection.execute(update(t.builds).where(emptied).values(lines=0))

    @override
    async def append(self, build_id: str, lines: Sequence[BuildLine]) -> None:
        if lines:
            rows = [{"build_id": build_id, **vars(one)} for one in lines]
            await self._connection.execute(insert(t.build_lines), rows)

    @override
    async def read(self, build_id: str, *, after: int, limit: int) -> list[BuildLine]:
        c = t.build_lines.c
        found = await self._connection.execute(
            select(c.number, c.at, c.phase, c.text)
            .where(c.build_id == build_id, c.number > after)
            .order_by(c.number)
            .limit(limit)
        )
        return [BuildLine(**row) for row in found.mappings()]

    def _values(self, build: Build) -> dict[str, Any]:
        values = vars(build) | {"by": dict(build.by), "stages": list(build.stages)}
        del values["plan"]  # MiB to encrypt, and builds are saved every second
        return values | {"status": build.status.value}

    def _planned(self, plan: Mapping[str, object]) -> dict[str, str]:
        return {"plan_sealed": self._seal.close({"plan": json.dumps(dict(plan))})}

    async def _taken(self, statement: Any, *columns: Any) -> Build | None:
        found = await self._connection.execute(statement.returning(*columns))
        row = found.mappings().first()
        return None if row is None else self._build(row)

    async def _builds(self, statement: Any) -> list[Build]:
        found = await self._connection.execute(statement)
        return [self._build(row) for row in found.mappings()]

    def _build(self, row: Mapping[Any, Any]) -> Build:
        values = {name: one for name, one in row.items() if not str(name).startswith("lease_")}
        sealed = values.pop("plan_sealed", None)
        plan = {} if sealed is None else json.loads(self._seal.open(sealed)["plan"])
        status, stages = BuildStatus(values.pop("status")), tuple(values.pop("stages"))
        return Build(**values, plan=plan, status=status, stages=stages)


class UploadTable(UploadRows):
    """See core.contracts.store.UploadRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, upload: Upload) -> None:
        await self._connection.execute(insert(t.uploads).values(vars(upload)))

    @override
    async def find(self, org_id: str, upload_id: str) -> Upload | None:
        c = t.uploads.c
        found = await self._connection.execute(
            select(t.uploads).where(c.id == upload_id, c.org_id == org_id)
        )
        row = found.mappings().first()
        return None if row is None else Upload(**row)

    @override
    async def kept(self, org_id: str) -> Kept:
        c = t.uploads.c
        return await _kept(self._connection, c.size_bytes, c.org_id == org_id)

    @override
    async def old(self, server_id: str, *, before: datetime) -> list[Upload]:
        c = t.uploads.c
        found = await self._connection.execute(
            select(t.uploads).where(c.server_id == server_id, c.created_at < before)
        )
        return [Upload(**row) for row in found.mappings()]

    @override
    async def remove(self, upload_id: str, *, since: datetime | None = None) -> bool:
        c = t.uploads.c
        which = [c.id == upload_id] if since is None else [c.id == upload_id, c.created_at == since]
        done = await self._connection.execute(delete(t.uploads).where(*which))
        return done.rowcount > 0


class CredentialTable(CredentialRows):
    """See core.contracts.store.CredentialRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    @override
    async def add(self, credential: RegistryCredential) -> None:
        values = dict(vars(credential))
        secret = {name: values.pop(name) for name in ("username", "password")}
        await self._connection.execute(
            insert(t.registry_credentials).values(**values, sealed=self._seal.close(secret))
        )

    @override
    async def find(self, org_id: str, credential_id: str) -> RegistryCredential | None:
        c = t.registry_credentials.c
        found = await self._where(c.id == credential_id, c.org_id == org_id)
        return found[0] if found else None

    @override
    async def of(self, org_id: str) -> list[RegistryCredential]:
        return await self._where(t.registry_credentials.c.org_id == org_id)

    @override
    async def remove(self, org_id: str, credential_id: str) -> bool:
        c = t.registry_credentials.c
        done = await self._connection.execute(
            delete(t.registry_credentials).where(c.id == credential_id, c.org_id == org_id)
        )
        return done.rowcount > 0

    async def _where(self, *which: ColumnElement[bool]) -> list[RegistryCredential]:
        found = await self._connection.execute(
            select(t.registry_credentials)
            .where(*which)
            .order_by(t.registry_credentials.c.created_at.desc())
        )
        credentials = []
        for row in found.mappings():
            values: dict[str, Any] = dict(row)
            values |= self._seal.open(values.pop("sealed"))
            credentials.append(RegistryCredential(**values))
        return credentials


class OrgSecretTable(OrgSecretRows):
    """See core.contracts.store.OrgSecretRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    @override
    async def add(self, secret: Secret) -> None:
        try:
            await self._connection.execute(insert(t.org_secrets).values(**self._values(secret)))
        except IntegrityError as error:
            raise AlreadyExistsError(
                f"cannot add the secret {secret.name}: there is one of that name; replace its value"
            ) from error

    @override
    async def find(self, org_id: str, name: str) -> Secret | None:
        found = await self._where(*_named(org_id, name))
        return found[0] if found else None

    @override
    async def of(self, org_id: str) -> list[Secret]:
        return await self._where(t.org_secrets.c.org_id == org_id)

    @override
    async def replace(self, secret: Secret) -> bool:
        values = self._values(secret)
        kept = {name: values[name] for name in ("hosts", "sealed", "changed_at")}
        which = _named(secret.org_id, secret.name)
        done = await self._connection.execute(update(t.org_secrets).where(*which).values(**kept))
        return done.rowcount > 0

    @override
    async def remove(self, org_id: str, name: str) -> bool:
        done = await self._connection.execute(delete(t.org_secrets).where(*_named(org_id, name)))
        return done.rowcount > 0

    @override
    async def used(self, org_id: str, name: str, *, at: datetime) -> None:
        c = t.org_secrets.c
        is_later = or_(c.last_used_at.is_(None), c.last_used_at < at)
        await self._connection.execute(
            update(t.org_secrets).where(*_named(org_id, name), is_later).values(last_used_at=at)
        )

    def _values(self, secret: Secret) -> dict[str, Any]:
        values = dict(vars(secret)) | {"hosts": list(secret.hosts)}
        return values | {"sealed": self._seal.close({"value": values.pop("value")})}

    async def _where(self, *which: ColumnElement[bool]) -> list[Secret]:
        found = await self._connection.execute(
            select(t.org_secrets).where(*which).order_by(t.org_secrets.c.name)
        )
        secrets = []
        for row in found.mappings():
            values: dict[str, Any] = dict(row) | {"hosts": tuple(row["hosts"])}
            values |= self._seal.open(values.pop("sealed"))
            secrets.append(Secret(**values))
        return secrets


def _named(org_id: str, name: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return t.org_secrets.c.org_id == org_id, t.org_secrets.c.name == name


def _of(table: Any, org_id: str, slug: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return table.c.org_id == org_id, table.c.slug == slug


def _is_waiting() -> ColumnElement[bool]:
    return and_(t.builds.c.ended_at.is_(None), t.builds.c.status == BuildStatus.WAITING.value)


def _until(lasts: timedelta) -> Any:
    return t.now() + lasts // timedelta(microseconds=1)


async def _kept(connection: Connection, size: Any, *which: ColumnElement[bool]) -> Kept:
    found = await connection.execute(
        select(
            func.count().label("count"),
            cast(func.coalesce(func.sum(size), 0), BigInteger).label("size_bytes"),
        ).where(*which)
    )
    return Kept(**found.mappings().one())
