"""Terminals for browsers: a ticket, which any page can carry, opens a shell.

A shell outlives its connection for a while. A client that returns with its name resumes at the byte
that it had reached.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from sandyard.server.core.errors import GuestNotFoundError, InvalidArgumentError, NotFoundError
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.ops import Size, Start
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.processes import Following, Processes, Which
from sandyard.server.service.sandboxes.register import Register
from sandyard.server.service.sandboxes.tickets import Tickets
from sandyard.server.service.sandboxes.uses import Use

KIND = "terminal"
HANG_UP_S = 600.0
_TAG = "terminal-"
_NAME_MAX = 64
_OPEN = Use("terminal", "Terminal opened", "open a terminal in")
_LIVE = Use("terminal", "", "follow a terminal in", is_in_feed=False)
FIRST_SIZE = Size(80, 24)


@dataclass(frozen=True)
class TerminalTicket:
    """A one-time ticket, its `secret`. `name` identifies the shell, to return to it."""

    secret: str
    sandbox_id: str
    name: str
    expires_at: datetime


class Terminals:
    """Issues tickets and opens terminals."""

    def __init__(self, register: Register, processes: Processes, tickets: Tickets) -> None:
        self._register = register
        self._processes = processes
        self._tickets = tickets

    async def issue(
        self,
        actor: Actor,
        reference: str,
        name: str | None = None,
        *,
        request: Repeatable | None = None,
    ) -> TerminalTicket:
        """Create a ticket for a new terminal, or for an earlier one. A repeated `request` gets the
        same ticket, whether it was used meanwhile or not.

        Raises:
            NotFoundError: the actor has no such sandbox.
            InvalidArgumentError: the name is not a terminal's.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        if name is not None and (not name.startswith(_TAG) or len(name) > _NAME_MAX):
            raise InvalidArgumentError(
                "cannot use {field}: give one that came with a session, or none",
                field="terminal_id",
            )
        known, shell = name is not None, name or f"{_TAG}{new_uuid()}"
        issued = await self._tickets.issue(
            actor, sandbox, KIND, json.dumps([shell, known]), request=request
        )
        shell, _ = json.loads(issued.detail)
        return TerminalTicket(issued.secret, sandbox.id, shell, issued.expires_at)

    async def check(self, admission: Admission) -> None:
        """Return if the ticket's issuer still has the right. See `Tickets.check`."""
        await self._tickets.check(admission)

    @asynccontextmanager
    async def open(
        self, admission: Admission, size: Size, offset: int | None
    ) -> AsyncIterator[Following]:
        """Open a ticket's terminal, or resume it from an offset.

        Raises:
            NotFoundError: it was opened before, and its shell has ended.
            For the rest see `Processes.start`.
        """
        name, known = json.loads(admission.detail)
        actor, sandbox_id, which = admission.actor, admission.sandbox_id, Which(tag=name)
        if not known:
            wish = Start(
                login=True,
                cwd="~",
                tag=name,
                terminal=size,
                hang_up_s=HANG_UP_S,
                # The type of terminal for the guest's programs.
                env={"TERM": "xterm-256color", "COLORTERM": "truecolor"},
            )
            await self._processes.launch(actor, sandbox_id, wish, _OPEN)
        try:
            following = self._processes.follow(
                actor, sandbox_id, which, 0 if offset is None else offset, use=_LIVE, live=True
            )
            async with following as found:
                yield found
        except GuestNotFoundError as error:
            raise NotFoundError(
                "cannot come back to the terminal: its shell has ended; open a new one"
            ) from error

    async def resize(self, admission: Admission, pid: int, size: Size) -> None:
        """Change the size of a terminal. See `Processes.resize`."""
        await self._processes.resize(
            admission.actor, admission.sandbox_id, Which(pid=pid), size, use=_LIVE
        )
