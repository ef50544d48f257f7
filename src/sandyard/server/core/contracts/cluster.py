"""Registration and heartbeats between nodes on other hosts and the control planes."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Protocol

from sandyard.server.core.contracts.node import NodeView
from sandyard.server.core.records import NodeStart


@dataclass(frozen=True)
class Application:
    """A node's request for credentials: a certificate request (PEM), and its public key for
    NATS."""

    request: str
    key: str


@dataclass(frozen=True)
class Identity:
    """A node's credentials: its certificate and the authority's (PEM), a token for NATS and its
    address, and the authorities of the servers. They are useless without the node's private keys.

    `also_trusted` are the certificates of further authorities, while one is being replaced.
    """

    node_id: str
    installation: str
    certificate: str
    authority: str
    nats_authority: str
    token: str = field(repr=False)
    servers: tuple[str, ...] = ()
    also_trusted: str = ""

    @property
    def trust(self) -> str:
        """What differs from that of an identity that trusts or is signed by other authorities."""
        return trust_of(self.authority, self.also_trusted, self.nats_authority)


def trust_of(authority: str, also_trusted: str, nats_authority: str) -> str:
    """See `Identity.trust`."""
    text = json.dumps([authority, also_trusted, nats_authority])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Joining:
    """A host's request to become a node, with the secret of its invite; `name` is for people."""

    secret: str = field(repr=False)
    name: str
    application: Application


@dataclass(frozen=True)
class Hello:
    """A node's process has started, or needs new credentials."""

    start: NodeStart
    application: Application


@dataclass(frozen=True)
class Welcome:
    """What a node receives for its hello; `door` is the address of the control plane."""

    epoch: int
    lease_s: float
    identity: Identity
    door: str = ""


@dataclass(frozen=True)
class Beat:
    """A node's heartbeat; `view` is its state, once it is known."""

    epoch: int
    view: NodeView | None = None


@dataclass(frozen=True)
class Grant:
    """The lease that a heartbeat is answered with. Its duration counts from before the heartbeat
    was sent. `door` is the address of the control plane, `trust` that of its identities: with
    another one, a node needs a new identity."""

    lease_s: float
    door: str = ""
    trust: str = ""


class Registrar(Protocol):
    """Authenticates nodes."""

    @property
    def trust(self) -> str:
        """The `Identity.trust` of what it issues now."""
        ...

    def identity_of(self, node_id: str, application: Application) -> Identity:
        """Return the credentials of a node.

        Raises:
            InvalidArgumentError: its certificate request or its NATS key is invalid.
        """
        ...


class Presence(Protocol):
    """Receives registrations and heartbeats of nodes."""

    async def hello(self, node_id: str, hello: Hello) -> Welcome:
        """Register the start of a node's process; idempotent.

        Raises:
            NotFoundError: there is no such node, or it was removed.
            ConflictError: another process has the node's lease, on another host.
        """
        ...

    async def beat(self, node_id: str, beat: Beat) -> Grant:
        """Record a heartbeat, and extend the node's lease.

        Raises:
            NotFoundError: there is no such node, or it was removed.
            ConflictError: a later process of the node has started.
        """
        ...


class Registry(Presence, Protocol):
    """Where hosts join as nodes; also receives their registrations and heartbeats."""

    async def join(self, joining: Joining) -> Identity:
        """Make a host a node.

        Raises:
            PermissionDeniedError: its invite is unknown, used or expired.
            ConflictError: another node has its name.
            InvalidArgumentError: its certificate request cannot be signed.
        """
        ...
