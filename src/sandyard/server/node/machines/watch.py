"""Watches over a running machine until it ends: its console, its stalls, its agent."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from sandyard.server.core.contracts.node import POWERED_OFF
from sandyard.server.core.errors import ConflictError, SandyardError
from sandyard.server.core.ops import Hello
from sandyard.server.drivers.contract import End, Machine
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.machines.body import Body
from sandyard.server.node.machines.means import Means
from sandyard.server.tasks import beside

log = logging.getLogger(__name__)

_SILENCES = 2  # in a row, before they are told


class Pulse:
    """What is known of a machine from moment to moment.

    It `is_held` while its node holds it still to save it, and `held_for` a reason until that has
    passed; it has a `stall` where it stands still by itself, and it `is_silent` when its agent did
    not answer several times.
    """

    def __init__(self) -> None:
        self.is_held = False
        self.is_silent = False
        self.stall: End | None = None
        self.held_for: End | None = None
        self.answered_at = 0.0
        self._missed = 0

    @property
    def stands_still(self) -> bool:
        """Whether an agent cannot be expected to answer."""
        return self.is_held or self.why_still is not None

    @property
    def why_still(self) -> End | None:
        """Why it stands still, if it does so for long."""
        return self.held_for or self.stall

    def hold(self, *, is_held: bool) -> None:
        """Note that the machine is held still, or no longer."""
        self.is_held = is_held

    def answered(self, at: float) -> bool:
        """Note that the agent answered; True if it was silent before."""
        was_silent = self.is_silent
        self.answered_at, self._missed, self.is_silent = at, 0, False
        return was_silent

    def missed(self) -> bool:
        """Note that the agent did not answer; True if it is silent from now on.

        One that was held still while it was asked could not.
        """
        if self.stands_still:
            return False
        self._missed += 1
        was_silent, self.is_silent = self.is_silent, self._missed >= _SILENCES
        return self.is_silent and not was_silent

    def note_stall(self, stall: End | None) -> bool:
        """Note why the machine stands still, if it does; True if that is new."""
        was, self.stall = self.stall, stall
        return was != stall

    def forget(self) -> None:
        """Know nothing any more: the machine is gone."""
        self.is_silent, self.stall, self.held_for, self._missed = False, None, None, 0


async def watch(
    machine: Machine,
    body: Body,
    pulse: Pulse,
    means: Means,
    link_of: Callable[[], AgentLink | None],
    on_answer: Callable[[], None],
) -> End:
    """Return how a machine ended, once it has; `on_answer` is told of each beat that its agent
    answered."""
    async with beside(end_of(machine)) as ending, beside(_beat(pulse, means, link_of, on_answer)):
        while not ending.done():
            halted = await look(machine, body, pulse, means)
            if halted is not None and not await _is_there(link_of(), means):
                return halted
            with suppress(TimeoutError):
                async with means.clock.timeout(means.limits.watch_period_s):
                    await asyncio.wait([ending])
        body.append_console(await machine.console())
        return ending.result()


async def look(machine: Machine, body: Body, pulse: Pulse, means: Means) -> End | None:
    """Take in what a machine prints and whether it stands still.

    Returns its end where it says that it has halted and seems to have; its agent may know better.
    """
    try:
        body.append_console(await machine.console())
        if pulse.held_for is not None:  # it goes on when its node lets it
            return None
        stall = await machine.stall()
        if stall is not None and stall.code == POWERED_OFF:
            return stall
        if pulse.note_stall(stall):
            means.on_change()
    except Exception:  # what one look does must not leave a machine unwatched
        log.exception("a look at a machine failed; looking again soon")
    return None


async def _is_there(link: AgentLink | None, means: Means) -> bool:
    """Tell whether a machine's agent answers; one that cannot be asked now may do so later."""
    try:
        return link is None or await _answers(link, means)
    except Exception:  # as for a look
        log.exception("a machine's agent could not be asked; asking again soon")
        return True


async def _beat(
    pulse: Pulse,
    means: Means,
    link_of: Callable[[], AgentLink | None],
    on_answer: Callable[[], None],
) -> None:
    """Ask the agent now and then whether it is there."""
    while True:
        await means.clock.sleep(means.limits.heartbeat_s)
        link = link_of()
        if pulse.stands_still or link is None:
            continue
        try:
            if await _answers(link, means):
                has_changed = pulse.answered(means.clock.monotonic())
                on_answer()
            else:
                has_changed = pulse.missed()
        except Exception:  # as for a look; what the host lacks for a moment says nothing of it
            log.exception("a machine's agent could not be asked; asking again soon")
            continue
        if has_changed:
            means.on_change()


async def _answers(link: AgentLink, means: Means) -> bool:
    """Tell whether an agent answers as one should; whatever else it says, it is a hostile guest."""
    try:
        await link.ask(Hello(), limit_s=means.patience(means.limits.heartbeat_s))
    except ConflictError:  # the machine has ended, which its watch will tell
        return True
    except SandyardError:
        return False
    return True


async def end_of(machine: Machine) -> End:
    """Return how a machine ended; a wait that fails is told as its end."""
    try:
        return await machine.wait()
    except Exception as error:  # noqa: BLE001 - raised here it would end what waits beside it
        return End("machine_died", f"the machine can no longer be watched: {error}")
