"""Says what an upgrade to this version would do, before anything is changed."""

from collections.abc import AsyncIterator
from pathlib import Path

from sandyard.build import build_version
from sandyard.server.app.database import is_sqlite, schema_of
from sandyard.server.app.doctor import examine_backups, examine_saved_machines
from sandyard.server.app.installation import is_member
from sandyard.server.app.links import Finding
from sandyard.server.app.settings import Settings
from sandyard.server.core.errors import SandyardError
from sandyard.server.links.sql import Schema
from sandyard.server.node.host.disks import free_mib


async def check(settings: Settings) -> AsyncIterator[Finding]:
    """Compare this version with what the installation on this host has."""
    yield Finding("ok", f"this is version {build_version()}")
    if is_member(settings.home) and not settings.cluster.nats:
        yield Finding(
            "note", "this host is a node",
            "update the control planes first, then the nodes one after the other; machines run on",
        )  # fmt: skip
    else:
        async for finding in _database(settings):
            yield finding
        yield examine_backups(settings)
    if not settings.cluster.nats:  # a control plane has no machines
        async for finding in examine_saved_machines(settings):
            yield finding


async def _database(settings: Settings) -> AsyncIterator[Finding]:
    try:
        schema = await schema_of(settings)
    except SandyardError as error:
        yield Finding("bad", error.message, "see docs/howto/upgrade.md")
        return
    if schema.present is None:
        yield Finding("ok", "there is no database yet")
    elif schema.is_ahead:
        yield Finding(
            "note", f"a newer version has migrated the database to {schema.present}",
            "this version can use it; update it when the others are updated",
        )  # fmt: skip
    elif not schema.is_behind:
        yield Finding("ok", f"the database needs no migration: its schema is {schema.present}")
    else:
        for finding in _migration(settings, schema):
            yield finding


def _migration(settings: Settings, schema: Schema) -> list[Finding]:
    assert schema.present is not None
    what = f"the database will be migrated from {schema.present} to {schema.newest}"
    path = Path(settings.store_url.removeprefix("sqlite:///")) if is_sqlite(settings) else None
    if path is not None:
        copy = f"{path}.schema-{schema.present}"
        found = [Finding("note", what, f"the server does so when it starts, and keeps {copy}")]
        size_mib = path.stat().st_size // 2**20
        if free_mib(path.parent) < 2 * size_mib:
            found.append(
                Finding(
                    "bad",
                    f"the copy needs {size_mib} MiB, and the disk is nearly full",
                    f"free some space in {path.parent}",
                )
            )
    else:
        found = [Finding("note", what, "make a backup, then run `sandyard admin migrate`")]
    if schema.shuts_out_older:
        found.append(
            Finding(
                "note",
                f"then servers that know only {schema.present} cannot use the database",
                "stop all of them first; to go back, restore the database as it was before",
            )
        )
    else:
        found.append(
            Finding("ok", "servers of the version before can use the database after that, too")
        )
    return found
