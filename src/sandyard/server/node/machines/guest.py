"""What a node asks of the guest in one machine, and knows of its state."""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from enum import Enum
from typing import Any

from sandyard.server.core.contracts.node import MachineWish, Opened
from sandyard.server.core.egress import Credentials
from sandyard.server.core.errors import ConflictError, MachineDeadError, SandyardError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.ops import (
    CLOSED_PORT,
    AnswerT,
    Flush,
    MountAll,
    MountPoint,
    Operation,
    SetUp,
    Trust,
    Unmount,
    Wake,
)
from sandyard.server.node.agent import AgentLink, run_command
from sandyard.server.node.exports.shares import Share
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.watch import Pulse

WAKE_LIMIT_S = 15.0
ENDED = MachineDeadError("the machine of the sandbox ended meanwhile")
_CLOCK_ERROR_S = 0.04
_CLOCK_TRIES = 3
_SETTLED_S = 60.0
# Nothing listens there: the gateway refuses every connection that it does not forward.
_REHEARSAL = MountAll(CLOSED_PORT, "rehearsal", (MountPoint("rehearsal", "/mnt"),))
_SETTLING_TRIES = 30
_SPARE_LIMIT_S = 5.0
_UNMOUNT_S = 5.0


class Was(Enum):
    """What a machine was before it is set up; this decides what must be renewed."""

    NOBODYS = "nobodys"  # just booted, or restored from a golden machine
    UNIQUE = "unique"  # set up before in the pool, and running since
    IN_USE = "in_use"  # a sandbox, with connections of its own


class Guest:
    """The guest of a machine. It can be asked once it has a `link`."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._uses = 0
        self.link: AgentLink | None = None
        self.pulse = Pulse()
        self._settled_at: tuple[float, float] | None = None

    @property
    def is_used(self) -> bool:
        """Whether an operation is in progress that counts as a use of its sandbox."""
        return self._uses > 0

    def meet(self, link: AgentLink, *, has_answered: bool) -> None:
        """Use a link from now on."""
        self.link = link
        if has_answered:
            self.note_answer()

    def break_off(self, end: ConflictError) -> None:
        """End everything in progress with an error, and refuse new operations."""
        if self.link is not None:
            self.link.cut(end)

    def leave(self) -> None:
        """Close the link: the machine has ended."""
        self.break_off(ENDED)
        self.link = None

    def close_spare(self) -> None:
        """Close the spare connection; the guest continues."""
        if self.link is not None:
            self.link.close()

    def note_answer(self) -> None:
        """Note that the agent has just answered."""
        self.pulse.answered(self._means.clock.monotonic())

    # --- operations -----------------------------------------------------------------------

    @asynccontextmanager
    async def open(self, operation: Operation[AnswerT]) -> AsyncIterator[Opened[AnswerT]]:
        """Open an operation; see core.contracts.node.NodeTunnel.open."""
        link = self._link_or_raise()
        self._uses += operation.is_use
        try:
            limit_s = self._means.patience(self._means.limits.agent_s)
            async with link.open(operation, limit_s=limit_s) as opened:
                yield opened
        finally:
            self._uses -= operation.is_use
            # For the next operation; not earlier, because that would delay this one.
            self.keep_spare()

    def keep_spare(self) -> None:
        """Keep a connection to the agent ready for the next operation."""
        if self.link is not None and self.link.lacks_spare and not self.pulse.is_held:
            spare = self.link.open_spare(self._means.patience(_SPARE_LIMIT_S))
            self._means.crew.start(spare, "no connection is kept ready", quietly=True)

    async def run(self, command: str, *, limit_s: float, **how: Any) -> int:
        """Run a command, discard its output, and return its exit code. See `run_command` for
        `how`."""
        link, clock = self._link_or_raise(), self._means.clock
        return await run_command(link, command, limit_s=limit_s, clock=clock, **how)

    async def wake(self) -> None:
        """Renew clock, randomness and connections after the machine was suspended.

        Raises:
            UnavailableError, InternalError, InvalidArgumentError: that failed, and the machine must
                not be used.
        """
        asked_at = self._means.clock.monotonic()
        await self._link_or_raise().ask(self._waking(), limit_s=self._means.patience(WAKE_LIMIT_S))
        await self._correct_clock(asked_at)

    async def flush(self, *, limit_s: float) -> None:
        """Have the guest write its files to its disk.

        Raises:
            UnavailableError, InternalError: that failed, or took longer.
            UnsupportedError: its agent is too old.
        """
        await self._link_or_raise().ask(Flush(), limit_s=limit_s)

    async def set_clock(self) -> None:
        """Set the clock after the machine was suspended without losing connections."""
        waking = self._waking(keeps_connections=True)
        await self._link_or_raise().ask(waking, limit_s=self._means.patience(WAKE_LIMIT_S))

    async def settle_clock(self) -> None:
        """Set the clock of a machine of the pool as exactly as possible.

        Work on the pool has low priority, so a message may arrive late; that is retried.
        """
        for _ in range(_SETTLING_TRIES):
            asked_at = self._means.clock.monotonic()
            await self.set_clock()
            if self._means.clock.monotonic() - asked_at < _CLOCK_ERROR_S:
                break
        self._settled_at = (asked_at, self._wall_ahead_s())

    def _wall_ahead_s(self) -> float:
        clock = self._means.clock
        return clock.now().timestamp() - clock.monotonic()

    def _may_be_late(self) -> bool:
        """Tell whether the clock may be wrong although it was settled: a long time has passed, or
        the host's clock was set since."""
        if self._settled_at is None:
            return True
        at, ahead_s = self._settled_at
        has_gone_s = self._means.clock.monotonic() - at
        return has_gone_s > _SETTLED_S or abs(self._wall_ahead_s() - ahead_s) > _CLOCK_ERROR_S

    async def set_up(self, wish: MachineWish, *, was: Was, grows: bool, limit_s: float) -> str:
        """Turn the guest into the requested sandbox, unique among clones, and return its new token.

        Raises: see `wake`.
        """
        link = self._link_or_raise()
        asked_at = self._means.clock.monotonic()
        token, is_new, waking = new_secret(), was is not Was.UNIQUE, self._waking()
        is_late = is_new or self._may_be_late()
        await link.ask(
            SetUp(
                hostname=wish.hostname,
                env=wish.env,
                token=token,
                authorized_keys="".join(f"{key}\n" for key in wish.authorized_keys),
                password_hash=wish.root_password_hash,
                entropy=waking.entropy if is_late else None,
                wall_ns=waking.wall_ns if is_late else None,
                keeps_connections=was is not Was.IN_USE,
                machine_id=secrets.token_hex(16) if is_new else None,
                replaces_access=wish.replaces_access,
                disk_bytes=wish.shape.disk_mib * 2**20 if grows else None,
                pace=pace if (pace := self._means.drivers.pace) > 1 else None,
                trust=None if wish.credentials is None else _trust(wish.credentials),
            ),
            limit_s=limit_s,
        )
        link.use_token(token)
        if is_new:
            await self._correct_clock(asked_at)
        else:
            self.note_answer()
        return token

    async def trust(self, credentials: Credentials, *, limit_s: float) -> None:
        """Have the guest trust an authority; see `core.ops.Trust`.

        Raises:
            UnavailableError, InternalError, InvalidArgumentError: that failed.
            UnsupportedError: its agent is too old.
        """
        await self._link_or_raise().ask(_trust(credentials), limit_s=limit_s)

    async def mount(self, share: Share, *, limit_s: float) -> None:
        """Mount a share.

        Raises:
            UnavailableError, InternalError, InvalidArgumentError: that failed.
            UnsupportedError: its agent is too old for workspaces.
        """
        cache_s = self._means.limits.attribute_cache_s
        for operation in share.operations:
            asked = replace(operation, attribute_cache_s=cache_s)
            await self._link_or_raise().ask(asked, limit_s=limit_s)

    async def rehearse_mount(self) -> None:
        """Go through a mount as far as possible without a server, because a guest's first mount is
        slow. Nothing is mounted, and no error is raised."""
        with suppress(SandyardError):
            limit_s = self._means.patience(WAKE_LIMIT_S)
            await self._link_or_raise().ask(_REHEARSAL, limit_s=limit_s)

    async def unmount(self, path: str) -> None:
        """Unmount a path; for errors see `mount`."""
        limit_s = self._means.patience(_UNMOUNT_S)
        await self._link_or_raise().ask(Unmount(path), limit_s=limit_s)

    async def _correct_clock(self, asked_at: float) -> None:
        """Set the clock once more if the message that set it took long.

        The first message to a restored machine may take a tenth of a second to arrive, which makes
        its clock late.
        """
        for _ in range(_CLOCK_TRIES):
            now = self._means.clock.monotonic()
            self.pulse.answered(now)
            if now - asked_at < _CLOCK_ERROR_S:
                return
            asked_at = now
            await self.set_clock()

    def _waking(self, *, keeps_connections: bool = False) -> Wake:
        wall_ns = int(self._means.clock.now().timestamp() * 1e9)
        return Wake(os.urandom(64), wall_ns, keeps_connections)

    def _link_or_raise(self) -> AgentLink:
        if self.link is None:
            raise ENDED
        return self.link


def _trust(credentials: Credentials) -> Trust:
    return Trust(credentials.certificate, credentials.name_hash)
