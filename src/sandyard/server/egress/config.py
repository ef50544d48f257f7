"""The configuration of an egress process, and the message that starts one."""

from dataclasses import dataclass
from typing import Final

from sandyard.server.core.egress import Credentials, Network, Policy, Rules

CONFIG_MAX: Final = 2 * 1024 * 1024
"""Bytes of a configuration."""
EGRESS_PORT: Final = 15_001
"""The port of a slot's gateway that connections are redirected to."""
JOURNALS: Final = 2
"""Files that the journal is written to in turn."""


@dataclass(frozen=True)
class Server:
    """A DNS server."""

    address: str
    port: int = 53


@dataclass(frozen=True)
class Config:
    """The rules in force, the ranges beside them (see `core.egress.Rules`), and the resolvers.

    Without `credentials` a process keeps those that it has."""

    policy: Policy
    unreachable: tuple[str, ...]
    permitted: tuple[str, ...]
    servers: tuple[Server, ...]
    credentials: Credentials | None = None

    def rules(self) -> Rules:
        """Return the rules, ready to judge by."""
        unreachable, permitted = (
            tuple(Network(one) for one in ranges) for ranges in (self.unreachable, self.permitted)
        )
        return Rules(self.policy, unreachable, permitted)


@dataclass(frozen=True)
class Start:
    """How to start a process. With it come descriptors: the network namespace, an empty directory,
    the socket that receives configurations, the file for errors, the journals, and the sockets for
    questions to resolvers: `datagram_sockets`, then connections."""

    uid: int
    gateway: str
    datagram_sockets: int
    port: int = EGRESS_PORT
