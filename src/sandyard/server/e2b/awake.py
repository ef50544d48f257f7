"""Sandboxes as their clients find them: awake, resumed if they may be, or gone."""

from typing import Final

from sandyard.server.core.errors import NotFoundError
from sandyard.server.core.records import Sandbox
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.change import Changes
from sandyard.server.service.sandboxes.lifecycle import is_over
from sandyard.server.service.services import Services

_LEAST_S: Final = 300
"""How long a sandbox runs at least that is resumed because it is used."""


async def awake(services: Services, actor: Actor, sandbox: Sandbox) -> Sandbox:
    """Return a sandbox for a request that uses it. One that resumes when it is used is resumed if
    paused, and gets a later end if it has just reached the one at which it would be paused.

    Raises:
        NotFoundError: it has reached its end.
    """
    lives_s = max(_LEAST_S, sandbox.lives_s or 0)
    if sandbox.status in (Status.PAUSED, Status.PAUSING) and sandbox.auto_resume:
        return await services.sandboxes.resume(actor, sandbox.id, lives_s=lives_s)
    if not is_over(sandbox, services.clock.now()):
        return sandbox
    if sandbox.pauses_at_end and sandbox.auto_resume:
        changes = Changes(expires_in=lives_s, only_later=True)
        return await services.sandboxes.change(actor, sandbox.id, changes)
    raise NotFoundError(f"cannot find the sandbox {sandbox.id}: it has reached its end")
