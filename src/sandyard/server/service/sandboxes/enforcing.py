"""Puts the network rules of sandboxes in force on their nodes."""

from sandyard.server.core.contracts.node import NodeControl
from sandyard.server.core.egress import NOTHING
from sandyard.server.core.errors import (
    ConflictError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.node_ops import EnsureNetwork
from sandyard.server.core.records import Sandbox, Standing
from sandyard.server.core.states import ON_ITS_WAY_UP, Status
from sandyard.server.service.networks import Networks
from sandyard.server.service.sandboxes.platform import Platform

_LIMIT_S = 60.0
_PASSING = ON_ITS_WAY_UP | {Status.PAUSING}
_ALIVE = frozenset({Status.RUNNING, Status.SUSPECTED_MISSING})
MAY_RUN = _PASSING | _ALIVE
"""The statuses of sandboxes that have a machine, or will have one soon."""


class Enforcing:
    """See the module. The reconciler retries what fails."""

    def __init__(self, platform: Platform) -> None:
        self._register = platform.register
        self._nodes = platform.nodes
        self._networks = platform.networks

    async def enforce(self, sandbox: Sandbox) -> None:
        """Return once a sandbox's network rules are in force, or its machine does not run: then
        they are from its start.

        Raises:
            UnavailableError: they are not yet.
        """
        try:
            if sandbox.status in _PASSING:
                settled = frozenset(Status) - _PASSING
                sandbox = await self._register.wait_for(sandbox, settled, limit_s=_LIMIT_S)
            if sandbox.status in _ALIVE:
                await put_in_force(self._nodes.get(sandbox.node_id), self._networks, sandbox)
        except (NotFoundError, ConflictError) as error:
            # It was paused meanwhile, or others change its rules, too, who will wait for theirs.
            now = await self._register.reread(sandbox.id)
            if now.status in _ALIVE and now.version == sandbox.version:
                raise _not_enforced(error) from error
        except SandyardError as error:
            raise _not_enforced(error) from error


async def put_in_force(
    node: NodeControl, networks: Networks, sandbox: Sandbox | Standing, *, reported: str = ""
) -> None:
    """Have a node enforce the network rules of a sandbox's machine.

    If their credentials cannot be read, the machine reaches nothing until a later call succeeds:
    the rules that are in force may be wider. `reported` is the digest of the rules that the node
    reports, if that is known.

    Raises: see `core.node_ops.EnsureNetwork` and `Networks.credentials_of`.
    """
    incarnation, version = sandbox.incarnation, sandbox.version
    try:
        credentials = await networks.credentials_of(sandbox.org_id, sandbox.network)
    except Exception:
        if reported != NOTHING.digest:  # each change on the node has it compared again
            await node.do(
                EnsureNetwork(sandbox.id, incarnation=incarnation, policy=NOTHING, version=version)
            )
        raise
    await node.do(
        EnsureNetwork(
            sandbox.id,
            incarnation=incarnation,
            policy=sandbox.network.bare,
            credentials=credentials,
            version=version,
        )
    )


def _not_enforced(error: SandyardError) -> UnavailableError:
    return UnavailableError(
        f"the network rules are stored, but not in force yet: {error.message}; they will be as "
        "soon as the sandbox's host can enforce them; ask again to wait for that"
    )
