"""What an operator sees of a node: what the database knows, and what the node itself says."""

import asyncio
from dataclasses import dataclass

from sandyard.server.app.cluster import ControlLogin, nats_tls, open_fleet, write_papers
from sandyard.server.app.installation import server_id_of
from sandyard.server.app.links import why_unreachable
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.node import NodeReport
from sandyard.server.core.errors import SandyardError, UnavailableError
from sandyard.server.core.node_ops import Report
from sandyard.server.core.records import JoinedNode
from sandyard.server.links.installation import Installation
from sandyard.server.links.local import SystemClock
from sandyard.server.links.nats.client import Inbox, RemoteNode
from sandyard.server.links.nats.link import Link, linked
from sandyard.server.service.fleet import Holdings

_LIMIT_S = 5.0


@dataclass(frozen=True)
class Overview:
    """A node. `report` is its own, or None with the reason in `silence`; `tunnel_trouble` says why
    control planes cannot reach it directly, empty if they can."""

    node: JoinedNode
    holdings: Holdings
    report: NodeReport | None
    silence: str
    tunnel_trouble: str

    @property
    def is_cut_from_nats_alone(self) -> bool:
        """Whether the node is reached directly, and not by way of NATS."""
        return self.report is None and not self.tunnel_trouble


async def look_at_node(settings: Settings, reference: str) -> Overview:
    """Look at a node by its name or id.

    Raises:
        NotFoundError: there is no such node.
    """
    async with open_fleet(settings) as (fleet, installation):
        node = await fleet.known(reference)
        holdings = await fleet.holdings(node.id)
    report, silence = None, ""
    try:
        report = await _report_of(settings, installation, node)
    except SandyardError as error:
        silence = error.message
    return Overview(
        node, holdings, report, silence, await _tunnel_trouble(settings, installation, node)
    )


async def _report_of(
    settings: Settings, installation: Installation, node: JoinedNode
) -> NodeReport:
    clock, name = SystemClock(), server_id_of(settings.home)
    login = ControlLogin(installation, name, clock)
    servers = settings.cluster.nats
    tls = nats_tls(servers, installation.nats.certificate.decode())
    link = Link(servers, "overview", login, tls, is_quiet=True)
    inbox = Inbox(link, name)
    try:
        async with asyncio.timeout(_LIMIT_S), linked(link):
            await link.until_up()
            return await RemoteNode(link, inbox, node.id).do(Report())
    except TimeoutError as error:
        raise UnavailableError(link.trouble or "it does not answer over NATS") from error


async def _tunnel_trouble(settings: Settings, installation: Installation, node: JoinedNode) -> str:
    if not node.host:
        return "it has never started"
    clock = SystemClock()
    papers = write_papers(
        settings.home / "cluster" / "doctor",
        *installation.control_papers(server_id_of(settings.home), clock.now()),
        installation.trusted,
    )
    return await why_unreachable(node, installation, papers)
