"""Watches a running machine until it ends: its console, its stalls, its agent."""

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
from sandyard.server.tasks import concurrently

log = logging.getLogger(__name__)

_SILENCES = 2  # in a row, before an agent counts as silent


class Pulse:
    """What is known of a running machine from moment to moment.

    It `is_held` while its node suspends it, has a `stall` if it stands still for another reason,
    and `is_silent` if its agent did not answer several times in a row.
    """

    def __init__(self) -> None:
        self.is_held = False
        self.is_silent = False
        self.stall: End | None = None
        self.answered_at = 0.0
        self._missed = 0

    @property
    def stands_still(self) -> bool:
        """Whether the agent cannot be expected to answer."""
        return self.is_held or self.stall is not None

    def answered(self, at: float) -> bool:
        """Note that the agent answered; return True if it was silent before."""
        was_silent = self.is_silent
        self.answered_at, self._missed, self.is_silent = at, 0, False
        return was_silent

    def missed(self) -> bool:
        """Note that the agent did not answer; return True if it counts as silent from now on.

        A machine that was suspended while it was asked could not answer.
        """
        if self.stands_still:
            return False
        self._missed += 1
        was_silent, self.is_silent = self.is_silent, self._missed >= _SILENCES
        return self.is_silent and not was_silent

    def note_stall(self, stall: End | None) -> bool:
        """Note why the machine stands still, or None; return True if that has changed."""
        was, self.stall = self.stall, stall
        return was != stall

    def forget(self) -> None:
        """Reset everything: the process has ended."""
        self.is_held = self.is_silent = False
        self.stall, self._missed = None, 0


async def watch(
    machine: Machine,
    body: Body,
    pulse: Pulse,
    means: Means,
    link_of: Callable[[], AgentLink | None],
    on_answer: Callable[[], None],
) -> End:
    """Return how a machine ended, once it has. `on_answer` is called for each heartbeat that its
    agent answered."""
    async with (
        concurrently(end_of(machine)) as ending,
        concurrently(_beat(pulse, means, link_of, on_answer)),
    ):
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
    """Read what a machine has printed, and note whether it stands still.

    Return its end if its console says that it has halted; its agent may show otherwise.
    """
    try:
        body.append_console(await machine.console())
        if pulse.is_held:  # that is not a stall
            return None
        stall = await machine.stall()
        if stall is not None and stall.code == POWERED_OFF:
            return stall
        if pulse.note_stall(stall):
            means.on_change()
    except Exception:  # one failure must not leave the machine unwatched
        log.exception("cannot check a machine; retrying")
    return None


async def _is_there(link: AgentLink | None, means: Means) -> bool:
    """Tell whether a machine's agent answers; if that cannot be found out now, assume so."""
    try:
        return link is None or await _answers(link, means)
    except Exception:  # as above
        log.exception("cannot ask the agent of a machine; retrying")
        return True


async def _beat(
    pulse: Pulse,
    means: Means,
    link_of: Callable[[], AgentLink | None],
    on_answer: Callable[[], None],
) -> None:
    """Send heartbeats to the agent."""
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
        except Exception:  # as above; a shortage on the host says nothing about the guest
            log.exception("cannot ask the agent of a machine; retrying")
            continue
        if has_changed:
            means.on_change()


async def _answers(link: AgentLink, means: Means) -> bool:
    """Tell whether an agent answers as it should; an error in the answer is no answer."""
    try:
        await link.ask(Hello(), limit_s=means.patience(means.limits.heartbeat_s))
    except ConflictError:  # the machine has ended, which the caller notices
        return True
    except SandyardError:
        return False
    return True


async def end_of(machine: Machine) -> End:
    """Return how a machine ended; a wait that fails counts as its end."""
    try:
        return await machine.wait()
    except Exception as error:  # noqa: BLE001 - raised here it would end concurrent work
        return End("machine_died", f"the machine can no longer be watched: {error}")
