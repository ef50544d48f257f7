"""Secrets of organizations: values that sandboxes' requests are given outside the machine."""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.egress import plain_host
from sandyard.server.core.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
)
from sandyard.server.core.ids import checked_text, new_uuid
from sandyard.server.core.records import Activity, Sandbox, Secret
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.networks import names_in, stamped
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.enforcing import MAY_RUN, Enforcing
from sandyard.server.service.sandboxes.lifecycle import WORK
from sandyard.server.service.sandboxes.platform import Platform

log = logging.getLogger(__name__)

SECRET_NAME: Final = "[A-Z_][A-Z0-9_]{0,63}"
"""What names of secrets are like, in upper case."""
_NAME = re.compile(SECRET_NAME)
_MOST: Final = 200
VALUE_MAX: Final = 16 * 1024
"""How many characters a secret can have."""
HOSTS_MAX: Final = 64
"""For how many hosts a secret can be."""
_AT_ONCE = 64
_IN_FORCE_S = 10.0


class Secrets:
    """The secrets. Values are never returned."""

    def __init__(self, platform: Platform, enforcing: Enforcing) -> None:
        self._store = platform.store
        self._clock = platform.clock
        self._repeats = platform.repeats
        self._bus = platform.bus
        self._enforcing = enforcing

    async def add(
        self,
        actor: Actor,
        *,
        name: str,
        value: str,
        hosts: Sequence[str],
        request: Repeatable | None = None,
    ) -> Secret:
        """Keep a secret. Names are in upper case. A repeated `request` returns the first one's.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            AlreadyExistsError: there is one of that name.
            ConflictError: there are too many.
        """
        actor.require("secret:write")
        if not name.isascii() or not _NAME.fullmatch(name.upper()):
            raise InvalidArgumentError(
                "cannot use {field}: a name has letters, digits and underscores, 64 at most, and "
                "begins with no digit",
                field="name",
            )
        now = self._clock.now()
        made = Secret(
            id=new_uuid(),
            org_id=actor.org_id,
            name=name.upper(),
            hosts=_checked_hosts(hosts),
            value=_checked_value(value),
            created_at=now,
            changed_at=now,
        )
        async with self._repeats.turn(actor, request), self._store.write(actor.org_id) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            found = await tx.org_secrets.of(actor.org_id)
            if ids is not None:
                known = next((one for one in found if one.id == ids[0]), None)
                if known is None:
                    raise NotFoundError("cannot find the secret that was added: it was deleted")
                return known
            if any(one.name == made.name for one in found):
                raise AlreadyExistsError(
                    f"cannot add the secret {made.name}: there is one of that name; replace its "
                    "value instead"
                )
            if len(found) >= _MOST:
                raise ConflictError(
                    f"cannot keep another secret: an organization has {_MOST} at most"
                )
            await tx.org_secrets.add(made)
            # One of that name may have been deleted, and requests refused since.
            waiting = await self._restamp(tx, made)
            await tx.activity.append(self._line("secret.added", "Secret added", actor, made))
            await self._repeats.note(tx, actor, request, (made.id,))
        await self._put_in_force(waiting)
        return made

    async def every(self, actor: Actor) -> list[Secret]:
        """Return the organization's secrets, by name."""
        actor.require("secret:read")
        async with self._store.read() as tx:
            return await tx.org_secrets.of(actor.org_id)

    async def replace(
        self, actor: Actor, name: str, *, value: str | None, hosts: Sequence[str] | None
    ) -> Secret:
        """Replace a secret's value, its hosts, or both. Requests are given the new value when this
        returns, except where a host is busy or away: there they are as soon as possible.

        Raises:
            NotFoundError: there is none of that name.
            InvalidArgumentError: a value is invalid; `facts` name the field.
        """
        actor.require("secret:write")
        if value is None and hosts is None:
            raise InvalidArgumentError("cannot replace the secret: give {field}", field="value")
        async with self._store.write(actor.org_id) as tx:
            found = await tx.org_secrets.find(actor.org_id, name.upper())
            if found is None:
                raise _unknown()
            made = replace(
                found,
                value=found.value if value is None else _checked_value(value),
                hosts=found.hosts if hosts is None else _checked_hosts(hosts),
                changed_at=self._clock.now(),
            )
            await tx.org_secrets.replace(made)
            waiting = await self._restamp(tx, made)
            await tx.activity.append(self._line("secret.replaced", "Secret replaced", actor, made))
        await self._put_in_force(waiting)
        return made

    async def delete(self, actor: Actor, name: str) -> Secret:
        """Delete a secret. Requests that need it are refused from then on.

        Raises:
            NotFoundError: there is none of that name.
        """
        actor.require("secret:write")
        async with self._store.write(actor.org_id) as tx:
            found = await tx.org_secrets.find(actor.org_id, name.upper())
            if found is None:
                raise _unknown()
            await tx.org_secrets.remove(actor.org_id, found.name)
            waiting = await self._restamp(tx, found)
            await tx.activity.append(self._line("secret.deleted", "Secret deleted", actor, found))
        await self._put_in_force(waiting)
        return found

    async def _restamp(self, tx: Transaction, secret: Secret) -> list[Sandbox]:
        """Have the sandboxes that use a secret given it anew, and return them: as long as a node
        has another stamp than the row, the reconciler tells it."""
        found = []
        for one in await tx.sandboxes.with_rules(secret.org_id):
            # Others are given it when they start.
            if one.status in MAY_RUN and secret.name in names_in(one.network):
                now = replace(one, network=stamped(one.network), updated_at=self._clock.now())
                if (stored := await tx.sandboxes.replace(now)) is not None:
                    found.append(stored)
        return found

    async def _put_in_force(self, sandboxes: Sequence[Sandbox]) -> None:
        """Return once sandboxes have a secret's new value; what takes longer than a few seconds, or
        fails, is left to the reconciler."""
        self._bus.hint(WORK)  # servers that worked on them have lost their leases
        turns = asyncio.Semaphore(_AT_ONCE)
        try:
            async with self._clock.timeout(_IN_FORCE_S), asyncio.TaskGroup() as tasks:
                for one in sandboxes:
                    tasks.create_task(self._renew(one, turns))
        except TimeoutError:
            log.warning("some sandboxes have an outdated secret for now: their hosts are busy")

    async def _renew(self, sandbox: Sandbox, turns: asyncio.Semaphore) -> None:
        try:
            async with turns:
                await self._enforcing.enforce(sandbox)
        except SandyardError as error:
            log.warning("a sandbox has an outdated secret for now: %s", error.message)
        except Exception:  # the others are not to wait for the reconciler
            log.exception("a sandbox has an outdated secret for now")

    def _line(self, kind: str, title: str, actor: Actor, secret: Secret) -> Activity:
        return line(
            kind, title, org_id=actor.org_id, actor=actor, resource_id=secret.id,
            at=self._clock.now(), summary=f"{secret.name}, for {', '.join(secret.hosts)}",
        )  # fmt: skip


def _checked_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    if not 1 <= len(hosts) <= HOSTS_MAX:
        raise InvalidArgumentError(
            f"cannot use {{field}}: a secret is for 1 to {HOSTS_MAX} hosts, such as "
            "api.example.com or *.example.com",
            field="hosts",
        )
    return tuple(dict.fromkeys(plain_host(one, "hosts") for one in hosts))


def _checked_value(value: str) -> str:
    checked_text(value, field="value")
    if not 1 <= len(value) <= VALUE_MAX or not value.isprintable() or value != value.strip():
        raise InvalidArgumentError(
            f"cannot use {{field}}: it needs 1 to {VALUE_MAX} printable characters, without line "
            "breaks, and no spaces around them",
            field="value",
        )
    return value


def _unknown() -> NotFoundError:
    return NotFoundError("cannot find the secret: check its name; `sandyard secret list` shows all")
