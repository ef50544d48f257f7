"""Opens the database of this host's installation."""

from contextlib import AbstractAsyncContextManager, ExitStack

from sandyard.server.app.installation import is_member, only_server, secret_key
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import ConflictError, InvalidArgumentError
from sandyard.server.links.sql import Schema, open_store, read_schema


def open_database(
    settings: Settings, *, clock: Clock | None = None, migrates: bool = False
) -> AbstractAsyncContextManager[Store]:
    """Open the store of this host's installation; see `links.sql.open_store`.

    Raises:
        InvalidArgumentError: this host is a node, and has no database.
    """
    refuse_node(settings)
    key = secret_key(settings.home)
    return open_store(settings.store_url, key=key, clock=clock, migrates=migrates)


def refuse_node(settings: Settings) -> None:
    """Return if this host may have the database.

    Raises:
        InvalidArgumentError: it is a node of an installation on several hosts.
    """
    if is_member(settings.home) and not settings.cluster.nats:
        raise InvalidArgumentError(
            "cannot do this here: this host is a node of an installation on several hosts, and "
            "has no database; run the command on a control plane's host"
        )


def is_sqlite(settings: Settings) -> bool:
    """Tell whether the database is a file on this host."""
    return settings.store_url.startswith("sqlite")


async def migrate(settings: Settings, *, is_sure: bool = True) -> tuple[Schema, Schema]:
    """Migrate the database to the schema of this version, and return its schema before and after.

    Servers on several hosts continue meanwhile, unless the migration is one that an older version
    cannot live with: then the operator must be sure. A server that has the database for itself must
    be stopped; it migrates when it starts.

    Raises:
        ConflictError: older servers could not use the database after it, and `is_sure` is false.
        UnavailableError: such a server is running; or see `open_database`.
    """
    refuse_node(settings)
    before = await schema_of(settings)
    if not is_sure and not is_sqlite(settings) and before.shuts_out_older:
        raise ConflictError(
            f"cannot migrate yet: servers that know only {before.present} cannot use the database "
            "after that; stop them all, then run this with --yes"
        )
    with ExitStack() as held:
        if is_sqlite(settings):
            held.enter_context(only_server(settings.home))
        async with open_database(settings, migrates=True):
            pass
    return before, await schema_of(settings)


async def schema_of(settings: Settings) -> Schema:
    """Return the schema of the database, without changing anything.

    Raises:
        UnavailableError: the database does not answer.
        InternalError: a newer Sandyard has changed it in a way that this version cannot use.
    """
    return await read_schema(settings.store_url)
