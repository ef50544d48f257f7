"""Replaces the certificate authorities of an installation on several hosts, step by step.

A new pair is *added*: within a minute all hosts trust it beside the one in use. Then it is *used*:
within a minute all hosts have certificates of it. Then the old pair is *removed*. No connection
fails, as each step waits until all hosts have taken the one before.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sandyard.server.app.certificates import expiry_of
from sandyard.server.app.clocks import agree_at_first, database_of
from sandyard.server.app.cluster import (
    INSTALLATION,
    ControlLogin,
    ensure_installation,
    write_papers,
)
from sandyard.server.app.database import open_database
from sandyard.server.app.installation import server_id_of
from sandyard.server.app.links import look_at_nats, why_unreachable
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import ConflictError, InvalidArgumentError
from sandyard.server.core.records import JoinedNode
from sandyard.server.links.installation import Installation
from sandyard.server.links.local import AgreedClock
from sandyard.server.links.tunnel.door import fingerprint_of

_SETTLED = timedelta(seconds=60)
"""Within this time all hosts that can be reached have taken a step."""
_ADD, _USE, _REMOVE = (f"sandyard admin authority {one}" for one in ("add", "use", "delete"))
_NATS = "nats-config for each NATS server, as docs/howto/cluster.md says; then "


@dataclass(frozen=True)
class TrustedAuthority:
    """An authority of the hosts, or of NATS servers."""

    whose: str
    state: str
    fingerprint: str
    expires_at: datetime


@dataclass(frozen=True)
class Authorities:
    """The authorities of an installation, and what an operator has to do next to replace them."""

    trusted: tuple[TrustedAuthority, ...]
    next_step: str


async def authorities(settings: Settings) -> Authorities:
    """Return the authorities that hosts trust."""
    async with _opened(settings) as (_, _, own, _):
        return _shown(own)


async def add_authority(settings: Settings) -> Authorities:
    """Have all hosts trust new authorities beside those in use.

    Raises:
        ConflictError: the last replacement is not over.
    """
    async with _opened(settings) as (store, clock, own, _):
        return await _write(store, own, own.with_added(clock.now()))


async def use_authority(settings: Settings, *, is_sure: bool = False) -> Authorities:
    """Have all hosts get certificates of the authorities that were added.

    Raises:
        ConflictError: none was added; or, unless the operator is sure, a host does not trust it.
    """
    async with _opened(settings) as (store, clock, own, nodes):
        changed = own.with_used(clock.now())
        if not is_sure:
            _check_settled(own, clock.now(), nodes)
            await _check_reachable(settings, changed, clock, nodes, "does not trust it yet")
        return await _write(store, own, changed)


async def remove_authority(settings: Settings, *, is_sure: bool = False) -> Authorities:
    """Have no host trust the authorities that are not in use.

    Processes that run trust them until they are restarted.

    Raises:
        ConflictError: there are none; or, unless the operator is sure, a host still has a
            certificate of them.
    """
    async with _opened(settings) as (store, clock, own, nodes):
        changed = own.with_removed(clock.now())
        if not is_sure and own.replaced is not None:
            _check_settled(own, clock.now(), nodes)
            await _check_renewed(settings, clock, changed, nodes)
        return await _write(store, own, changed)


@asynccontextmanager
async def _opened(
    settings: Settings,
) -> AsyncIterator[tuple[Store, Clock, Installation, list[JoinedNode]]]:
    if not settings.cluster.nats:
        raise InvalidArgumentError(
            "cannot look at certificate authorities: this installation is on one machine, or this "
            "is no control plane's host; set SANDYARD_CLUSTER__NATS as the control planes have it"
        )
    clock = AgreedClock()
    async with open_database(settings) as store:
        await agree_at_first(clock, database_of(store))
        own = await ensure_installation(store, clock)
        async with store.read() as tx:
            nodes = await tx.joined_nodes.all()
        yield store, clock, own, nodes


async def _write(store: Store, known: Installation, changed: Installation) -> Authorities:
    async with store.write(Turn.ALONE) as tx:
        if Installation.of(await tx.secrets.find(INSTALLATION) or {}) != known:
            raise ConflictError(
                "cannot change the authorities: another command has just changed them; run "
                "`sandyard admin authority show`"
            )
        await tx.secrets.replace(INSTALLATION, changed.values())
    return _shown(changed)


def _check_settled(own: Installation, now: datetime, nodes: list[JoinedNode]) -> None:
    since = now - (own.changed_at or now - _SETTLED)
    if timedelta() <= since < _SETTLED:
        left = round((_SETTLED - since).total_seconds())
        raise ConflictError(f"cannot do this yet: wait {left} s until all hosts took the last step")
    if away := [one.name for one in nodes if not one.has_lease]:
        raise ConflictError(
            f"cannot do this now: {', '.join(away)} did not take the last step, because it is not "
            "there; start it, or repeat this with --yes, and join that host again later"
        )


async def _check_renewed(
    settings: Settings, clock: Clock, changed: Installation, nodes: list[JoinedNode]
) -> None:
    """Refuse while a NATS server or a node shows a certificate of the authorities before."""
    server_id = server_id_of(settings.home)
    login = ControlLogin(changed, server_id, clock)
    for server in settings.cluster.nats:
        if not server.startswith("tls://"):
            continue
        found = await look_at_nats(server, login, changed.nats.certificate.decode())
        if found.level == "bad":
            raise ConflictError(
                f"cannot do this now: NATS at {server} shows no certificate of the new authority "
                f"({found.what}); run `sandyard admin nats-config` for it as before, copy the "
                "directory to its host, and run `nats-server --signal reload` there, or restart it "
                "if its log says that it refuses"
            )
    await _check_reachable(settings, changed, clock, nodes, "has no certificate of it yet")


async def _check_reachable(
    settings: Settings, own: Installation, clock: Clock, nodes: list[JoinedNode], why: str
) -> None:
    """Refuse while a node cannot be reached with what is to be in use."""
    papers = write_papers(
        settings.home / "cluster" / "doctor",
        *own.control_papers(server_id_of(settings.home), clock.now()),
        own.trusted,
    )
    for node in nodes:
        if node.has_lease and (trouble := await why_unreachable(node, own, papers)):
            raise ConflictError(
                f"cannot do this now: the node {node.name} cannot be reached with the new "
                f"authority: it {why}, or is of an older version ({trouble}); try again in a minute"
            )


def _shown(own: Installation) -> Authorities:
    pairs = [("in use", (own.authority.certificate, own.nats.certificate))]
    step = _ADD
    if own.added is not None:
        pairs.append(("added", (own.added[0].certificate, own.added[1].certificate)))
        step = _NATS + _USE
    elif own.replaced is not None:
        pairs.append(("replaced", own.replaced))
        step = _NATS + _REMOVE
    return Authorities(
        tuple(
            TrustedAuthority(whose, state, fingerprint_of(pem.decode()), expiry_of(pem))
            for state, both in pairs
            for whose, pem in zip(("hosts", "NATS"), both, strict=True)
        ),
        step,
    )
