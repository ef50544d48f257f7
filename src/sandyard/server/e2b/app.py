"""The E2B API's entries in the dispatch table."""

from collections.abc import Mapping
from dataclasses import dataclass

from sandyard.server.e2b.control.app import PREFIXES, make_control
from sandyard.server.e2b.credentials import add_verifiers
from sandyard.server.e2b.envd.app import make_envd
from sandyard.server.e2b.names import for_envd, for_port
from sandyard.server.e2b.ports import PortApp
from sandyard.server.front.dispatch import FaceEntry, Matcher
from sandyard.server.front.face import EdgeServices
from sandyard.server.front.hosts import at_paths, below
from sandyard.server.service.services import Services


@dataclass(frozen=True)
class E2b:
    """The entries for the API's own domain, and those for the host names of all APIs."""

    at_domain: tuple[FaceEntry, ...]
    beside_others: tuple[FaceEntry, ...]


def make_e2b(
    services: Services,
    edge: EdgeServices,
    *,
    domain: str | None,
    own: Matcher,
    has_public_ports: bool,
    images: Mapping[str, str],
) -> E2b:
    """Make the API. `domain` is its own domain, if it has one; `own` matches the host names that
    it shares with the other APIs. `images` are templates by the names of the images that they are
    used for."""
    add_verifiers(services.credentials, services.tokens, services.uploads, services.clock)
    envd, ports = make_envd(services, edge, domain), PortApp(services, edge, domain)
    control = make_control(services, edge, domain, has_public_ports=has_public_ports, images=images)
    at_domain: tuple[FaceEntry, ...] = ()
    if domain is not None:
        there = below(domain)
        at_domain = (
            FaceEntry(for_envd(there, domain), envd),
            FaceEntry(for_port(there, domain), ports, takes_tunnels=True),
            FaceEntry(there, control),
        )
    beside_others = (
        FaceEntry(for_envd(own, None), envd),
        FaceEntry(for_port(own, None), ports, takes_tunnels=True),
        FaceEntry(at_paths(own, exactly=PREFIXES, prefixes=PREFIXES), control),
    )
    return E2b(at_domain, beside_others)
