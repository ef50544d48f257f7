"""Checks the connections between the hosts of an installation, for the doctor."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sandyard.server.app.certificates import (
    AUTHORITY,
    E2B,
    MEND,
    OWN,
    PREVIEW,
    SOON,
    certificates_of,
    expiry_of,
    nats_expiry,
)
from sandyard.server.app.cluster import ControlLogin, ensure_installation, nats_tls, write_papers
from sandyard.server.app.database import open_database
from sandyard.server.app.installation import is_member, server_id_of
from sandyard.server.app.member import door_at, home_of
from sandyard.server.app.settings import Settings
from sandyard.server.core.errors import SandyardError, UnavailableError
from sandyard.server.core.records import JoinedNode
from sandyard.server.links.identities import node_name
from sandyard.server.links.installation import Installation, is_control_of
from sandyard.server.links.local import SystemClock
from sandyard.server.links.nats.link import Link, NatsLogin, linked
from sandyard.server.links.nats.tokens import Key, KeyLogin, NatsToken, Role
from sandyard.server.links.tunnel.client import NodeAddress, Tunnels
from sandyard.server.links.tunnel.door import reached
from sandyard.server.links.tunnel.ends import Papers, context_of

_LIMIT_S = 5.0
_NAMES = {OWN: "host's own", AUTHORITY: "authority's", PREVIEW: "previews'", E2B: "E2B API's"}
_NATS_MEND = (
    "run `sandyard admin nats-config` again as before, copy the directory to its host, and run "
    "`nats-server --signal reload` there"
)


@dataclass(frozen=True)
class Finding:
    """The result of one check. `mend` is the fix, empty if none is needed."""

    level: Literal["ok", "note", "bad"]
    what: str
    mend: str = ""


async def examine_links(settings: Settings) -> AsyncIterator[Finding]:
    """Check the connections that a control plane or a node needs; nothing on a single machine."""
    if settings.cluster.nats:
        async for finding in _of_control(settings):
            yield finding
    if is_member(settings.home):
        async for finding in _of_node(settings):
            yield finding


async def _of_control(settings: Settings) -> AsyncIterator[Finding]:
    clock, nodes = SystemClock(), list[JoinedNode]()
    try:
        async with open_database(settings) as store:
            installation = await ensure_installation(store, clock)
            async with store.read() as tx:
                nodes = await tx.joined_nodes.all()
    except SandyardError as error:
        yield Finding(
            "bad", f"the database cannot be used: {error.message}",
            "set SANDYARD_STORE__URL, start PostgreSQL, and have the right secret.key in the home",
        )  # fmt: skip
        return
    yield Finding("ok", "the database answers")
    for what, authority in (("", installation.authority), ("NATS ", installation.nats)):
        yield _expiry(
            f"the {what}certificate authority", expiry_of(authority.certificate), MEND[AUTHORITY]
        )
    server_id = server_id_of(settings.home)
    login = ControlLogin(installation, server_id, clock)
    for server in settings.cluster.nats:
        yield await look_at_nats(server, login, installation.nats_trusted.decode())
        if server.startswith("tls://"):
            with suppress(UnavailableError):  # the finding before says so
                yield _expiry(
                    f"the certificate of NATS at {server}", await nats_expiry(server), _NATS_MEND
                )
    papers = write_papers(
        settings.home / "cluster" / "doctor",
        *installation.control_papers(server_id, clock.now()),
        installation.trusted,
    )
    for node in nodes:
        yield await _node(node, installation, papers)
    if not nodes:
        yield Finding("note", "no host has joined", "run `sandyard admin node invite`")


def _expiry(what: str, at: datetime, mend: str) -> Finding:
    left = at - datetime.now(UTC)
    if left < timedelta():
        return Finding("bad", f"{what} has expired: {at:%Y-%m-%d}", mend)
    if left < SOON:
        return Finding("bad", f"{what} expires in {left.days} days: {at:%Y-%m-%d}", mend)
    return Finding("ok", f"{what} is valid until {at:%Y-%m-%d}")


def examine_certificates(settings: Settings) -> Iterator[Finding]:
    """Say until when the certificates in files of this host are valid."""
    for one in certificates_of(settings):
        yield _expiry(f"the {_NAMES[one.name]} certificate", one.expires_at, MEND[one.name])


async def look_at_nats(server: str, login: NatsLogin, authority: str) -> Finding:
    """Return whether a NATS server answers with a certificate of one of these authorities
    (PEM)."""
    link = Link((server,), "doctor", login, nats_tls((server,), authority), is_quiet=True)
    async with linked(link):
        try:
            async with asyncio.timeout(_LIMIT_S):
                await link.until_up()
        except TimeoutError:
            return Finding(
                "bad", f"NATS does not answer at {server}: {link.trouble or 'no answer'}",
                "start nats-server there, with what `sandyard admin nats-config` writes, and let "
                "its port through",
            )  # fmt: skip
    return Finding("ok", f"NATS answers at {server}")


async def _node(node: JoinedNode, installation: Installation, papers: Papers) -> Finding:
    if not node.has_lease:
        return Finding(
            "bad" if node.epoch else "note", f"the node {node.name} is not there",
            "run `sandyard node` on its host, and `sandyard doctor` if it does not stay",
        )  # fmt: skip
    if trouble := await why_unreachable(node, installation, papers):
        return Finding(
            "bad", f"the node {node.name} is there, and cannot be reached: {trouble}",
            f"let TCP through to {node.host}:{node.port}, or set SANDYARD_CLUSTER__ADDRESS "
            "on the node to what it is reached by",
        )  # fmt: skip
    return Finding("ok", f"the node {node.name} can be reached at {node.host}:{node.port}")


async def why_unreachable(node: JoinedNode, installation: Installation, papers: Papers) -> str:
    """Return why a control plane cannot connect to a node directly, or nothing if it can."""
    place = NodeAddress(node.host, node.port, node_name(installation.id, node.id))
    async with Tunnels(context_of(papers, is_server=False), lambda _: place) as tunnels:
        try:
            await tunnels.reach(node.id)
        except SandyardError as error:
            return error.message
    return ""


async def _of_node(settings: Settings) -> AsyncIterator[Finding]:
    try:
        home = home_of(settings)
    except SandyardError as error:
        yield Finding("bad", error.message)
        return
    login = KeyLogin(Key(Role.USER, home.seed), NatsToken(home.identity.token))
    for server in home.identity.servers:
        yield await look_at_nats(server, login, home.identity.nats_authority)
    tls = context_of(_own_papers(settings.home / "cluster"), is_server=False)
    is_control = is_control_of(home.identity.installation)
    for door in home.doors:
        try:
            await reached(*door_at(door), tls, is_control)
        except SandyardError as error:
            yield Finding(
                "bad", f"the control plane at {door} cannot be reached: {error.message}",
                "start `sandyard control` there, and let TCP through to that port",
            )  # fmt: skip
        else:
            yield Finding("ok", f"the control plane at {door} can be reached")


def _own_papers(folder: Path) -> Papers:
    return Papers(folder / "certificate.pem", folder / "key.pem", folder / "authority.pem")
