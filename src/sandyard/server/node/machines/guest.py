"""What a node says to the guest in one machine, and what it knows of how that is."""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from enum import Enum

from sandyard.server.core.contracts.node import MachineWish, Opened
from sandyard.server.core.errors import ConflictError, MachineDeadError, SandyardError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.ops import (
    CLOSED_PORT,
    AnswerT,
    MountAll,
    MountPoint,
    Operation,
    SetUp,
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
# Nobody listens there: the gateway refuses every connection that it was not told to pass on.
_REHEARSAL = MountAll(CLOSED_PORT, "rehearsal", (MountPoint("rehearsal", "/mnt"),))
_SETTLING_TRIES = 30
_SPARE_LIMIT_S = 5.0
_UNMOUNT_S = 5.0


class Was(Enum):
    """What a machine was before it is set up, which says how much there is to mend."""

    NOBODYS = "nobodys"  # just booted, or restored from a golden machine
    UNIQUE = "unique"  # set up before, for nobody, and running ever since
    IN_USE = "in_use"  # a sandbox, with connections of its own


class Guest:
    """See the module. There is something to say it to once it has a `link`."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._uses = 0
        self.link: AgentLink | None = None
        self.pulse = Pulse()
        self._settled_at: tuple[float, float] | None = None

    @property
    def is_used(self) -> bool:
        """Whether an operation is under way that counts as a use of its sandbox."""
        return self._uses > 0

    def meet(self, link: AgentLink, *, has_answered: bool) -> None:
        """Speak to it by this link from now on."""
        self.link = link
        if has_answered:
            self.note_answer()

    def break_off(self, end: ConflictError) -> None:
        """Break off what is under way, because of `end`, and have nothing begun any more."""
        if self.link is not None:
            self.link.cut(end)

    def leave(self) -> None:
        """Have nobody to speak to any more: the machine has ended."""
        self.break_off(ENDED)
        self.link = None

    def let_go(self) -> None:
        """Close what is open for later; the guest lives on."""
        if self.link is not None:
            self.link.close()

    def note_answer(self) -> None:
        """Note that it has just answered."""
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
            # For what is asked next; not earlier, for it would take time from this one.
            self.keep_spare()

    def keep_spare(self) -> None:
        """Have a connection to its agent ready for what is asked next."""
        if self.link is not None and self.link.lacks_spare and not self.pulse.is_held:
            spare = self.link.open_spare(self._means.patience(_SPARE_LIMIT_S))
            self._means.crew.start(spare, "no connection is kept ready", quietly=True)

    async def run(self, command: str, *, limit_s: float) -> int:
        """Run a command, take no interest in what it says, and return its exit code."""
        link = self._link_or_raise()
        return await run_command(link, command, limit_s=limit_s, clock=self._means.clock)

    async def wake(self) -> None:
        """Mend clock, randomness and connections after the machine stood still.

        Raises:
            UnavailableError, InternalError, InvalidArgumentError: they cannot be mended, and the
                machine must not be used.
        """
        asked_at = self._means.clock.monotonic()
        await self._link_or_raise().ask(self._waking(), limit_s=self._means.patience(WAKE_LIMIT_S))
        await self._correct_clock(asked_at)

    async def set_clock(self) -> None:
        """Set the clock after the machine was held still and lost no connection by that."""
        waking = self._waking(keeps_connections=True)
        await self._link_or_raise().ask(waking, limit_s=self._means.patience(WAKE_LIMIT_S))

    async def settle_clock(self) -> None:
        """Set the clock as exactly as may be of a machine that nobody waits for.

        What is made ahead gives way to what others wait for, and so may every message that sets it.
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
        """Tell whether its clock may be wrong by now, which was right when it was settled: it has
        gone by itself for long, or the host's has been set since."""
        if self._settled_at is None:
            return True
        at, ahead_s = self._settled_at
        has_gone_s = self._means.clock.monotonic() - at
        return has_gone_s > _SETTLED_S or abs(self._wall_ahead_s() - ahead_s) > _CLOCK_ERROR_S

    async def set_up(self, wish: MachineWish, *, was: Was, grows: bool, limit_s: float) -> str:
        """Make it the wished sandbox, unlike every other, and return the token that it accepts
        from now on; see `wake` for what is raised."""
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
            ),
            limit_s=limit_s,
        )
        link.use_token(token)
        if is_new:
            await self._correct_clock(asked_at)
        else:
            self.note_answer()
        return token

    async def mount(self, share: Share, *, limit_s: float) -> None:
        """Have it mount what it may.

        Raises:
            UnavailableError, InternalError, InvalidArgumentError: it does not.
            UnsupportedError: its agent is of a version that knows of no workspaces.
        """
        cache_s = self._means.limits.attribute_cache_s
        for operation in share.operations:
            asked = replace(operation, attribute_cache_s=cache_s)
            await self._link_or_raise().ask(asked, limit_s=limit_s)

    async def rehearse_mount(self) -> None:
        """Have it go through a mount as far as it comes without a server: its first is faster for
        that. Nothing is mounted, and nothing is raised."""
        with suppress(SandyardError):
            limit_s = self._means.patience(WAKE_LIMIT_S)
            await self._link_or_raise().ask(_REHEARSAL, limit_s=limit_s)

    async def unmount(self, path: str) -> None:
        """Have it use what is mounted at a path no more; see `mount` for what is raised."""
        limit_s = self._means.patience(_UNMOUNT_S)
        await self._link_or_raise().ask(Unmount(path), limit_s=limit_s)

    async def _correct_clock(self, asked_at: float) -> None:
        """Set its clock once more if the message that did was long under way.

        The first message to a machine that has just been restored may take a tenth of a second to
        arrive, and the clock is late by that.
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
