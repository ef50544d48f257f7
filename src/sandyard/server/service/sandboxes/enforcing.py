"""Puts the network rules of sandboxes in force on their nodes."""

from sandyard.server.core.errors import (
    ConflictError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.records import Sandbox
from sandyard.server.core.states import ON_ITS_WAY_UP, Status
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
                network = sandbox.network
                await self._nodes.get(sandbox.node_id).ensure_network(
                    sandbox.id,
                    incarnation=sandbox.incarnation,
                    policy=network.bare,
                    credentials=await self._networks.credentials_of(sandbox.org_id, network),
                    version=sandbox.version,
                )
        except (NotFoundError, ConflictError) as error:
            # It was paused meanwhile, or others change its rules, too, who will wait for theirs.
            now = await self._register.reread(sandbox.id)
            if now.status in _ALIVE and now.version == sandbox.version:
                raise _not_enforced(error) from error
        except SandyardError as error:
            raise _not_enforced(error) from error


def _not_enforced(error: SandyardError) -> UnavailableError:
    return UnavailableError(
        f"the network rules are stored, but not in force yet: {error.message}; they will be as "
        "soon as the sandbox's host can enforce them; ask again to wait for that"
    )
