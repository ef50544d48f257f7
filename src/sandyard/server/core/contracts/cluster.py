"""What a node on another host and the control planes tell each other of the node being there."""

from dataclasses import dataclass, field
from typing import Protocol

from sandyard.server.core.contracts.node import NodeView
from sandyard.server.core.records import NodeStart


@dataclass(frozen=True)
class Application:
    """What a node wants to be known by: a request for a certificate (PEM), and the public half of
    the key that it has for NATS."""

    request: str
    key: str


@dataclass(frozen=True)
class Identity:
    """What a node proves itself with: a certificate and its authority's (PEM), a token for NATS,
    where NATS is, and the authority of its servers. None of it is a secret but together with the
    node's own keys."""

    node_id: str
    installation: str
    certificate: str
    authority: str
    nats_authority: str
    token: str = field(repr=False)
    servers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Joining:
    """A host that wants to become a node, with the secret of its invite; `name` is for people."""

    secret: str = field(repr=False)
    name: str
    application: Application


@dataclass(frozen=True)
class Hello:
    """A node's process has started, or wants its identity renewed."""

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
    """A node is there; `view` is what it has, once it knows."""

    epoch: int
    view: NodeView | None = None


@dataclass(frozen=True)
class Grant:
    """It may be asked for things so much longer, counted from before it said that it is there;
    `door` is the address of the control plane."""

    lease_s: float
    door: str = ""


class Registrar(Protocol):
    """Authenticates nodes."""

    def identity_of(self, node_id: str, application: Application) -> Identity:
        """Return what a node is to prove itself with.

        Raises:
            InvalidArgumentError: what it applies with is no request, or no key.
        """
        ...


class Presence(Protocol):
    """Where nodes say that they are there."""

    async def hello(self, node_id: str, hello: Hello) -> Welcome:
        """Note that a node's process has started; twice is once.

        Raises:
            NotFoundError: there is no such node, or not any more.
            ConflictError: another process is this node, elsewhere, and lives.
        """
        ...

    async def beat(self, node_id: str, beat: Beat) -> Grant:
        """Note that a node is there.

        Raises:
            NotFoundError: there is no such node, or not any more.
            ConflictError: a later process of the node has started.
        """
        ...


class Registry(Presence, Protocol):
    """Where hosts become nodes, and say that they are there."""

    async def join(self, joining: Joining) -> Identity:
        """Make a host a node.

        Raises:
            PermissionDeniedError: its invite is not good, or not any more.
            InvalidArgumentError: what it applies with cannot be signed.
        """
        ...
