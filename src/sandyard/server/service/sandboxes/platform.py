"""What all services of a control plane share."""

from collections.abc import Mapping
from dataclasses import dataclass

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeControl, NodeTunnel
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.money import Prices
from sandyard.server.core.plans import Plan
from sandyard.server.service.networks import Networks, NewAuthority
from sandyard.server.service.nodes import Nodes
from sandyard.server.service.placement import Placement
from sandyard.server.service.repeats import Repeats
from sandyard.server.service.roster import Roster
from sandyard.server.service.sandboxes.frames import Open
from sandyard.server.service.sandboxes.lifecycle import Lifecycle
from sandyard.server.service.sandboxes.quota import Quota
from sandyard.server.service.sandboxes.register import Register
from sandyard.server.service.templates.shipped import ShippedTemplates
from sandyard.server.service.templates.templates import Templates


@dataclass(frozen=True)
class Platform:
    """The store, the nodes and the rules that services work with. `key` is the installation's."""

    server_id: str
    store: Store
    bus: Bus
    clock: Clock
    tunnel: NodeTunnel
    key: bytes
    plans: Mapping[str, Plan]
    prices: Prices
    enforces: bool
    roster: Roster | None
    nodes: Nodes
    networks: Networks
    placement: Placement
    templates: Templates
    lifecycle: Lifecycle
    register: Register
    repeats: Repeats
    quota: Quota
    opened: Open


def build_platform(
    *,
    server_id: str,
    store: Store,
    bus: Bus,
    clock: Clock,
    nodes: Mapping[str, NodeControl],
    roster: Roster | None,
    tunnel: NodeTunnel,
    key: bytes,
    plans: Mapping[str, Plan],
    prices: Prices,
    enforces: bool,
    new_authority: NewAuthority,
) -> Platform:
    """Return the platform on a store and nodes. `enforces` says whether credits are required."""
    known = Nodes(nodes, clock, roster)
    return Platform(
        server_id=server_id,
        store=store,
        bus=bus,
        clock=clock,
        tunnel=tunnel,
        key=key,
        plans=plans,
        prices=prices,
        enforces=enforces,
        roster=roster,
        nodes=known,
        networks=Networks(store, clock, new_authority),
        placement=Placement(known, clock, by_lot=roster is not None),
        templates=Templates(store, ShippedTemplates(known, clock), bus, clock),
        lifecycle=Lifecycle(store, bus, clock),
        register=Register(store, bus, clock),
        repeats=Repeats(clock, key),
        quota=Quota(clock=clock, plans=plans, prices=prices, enforces=enforces),
        opened=Open(),
    )
