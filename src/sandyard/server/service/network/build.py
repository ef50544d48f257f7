"""Builds the services about what sandboxes may reach."""

from dataclasses import dataclass

from sandyard.server.service.network.journals import Journals
from sandyard.server.service.network.secrets import Secrets
from sandyard.server.service.sandboxes.enforcing import Enforcing
from sandyard.server.service.sandboxes.platform import Platform


@dataclass(frozen=True)
class NetworkServices:
    """The services."""

    secrets: Secrets
    journals: Journals


def build_network(platform: Platform) -> NetworkServices:
    """Return the services."""
    return NetworkServices(
        secrets=Secrets(platform, Enforcing(platform)), journals=Journals(platform)
    )
