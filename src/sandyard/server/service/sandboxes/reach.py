"""The one way into a running sandbox, for every gateway.

A caller names the operation of the agent and the kind of use. `Reach` finds the sandbox, checks the
actor's rights, waits for or resumes the machine, records the use, and opens the operation. While an
operation that counts as a use is open, the node reports it, and the sandbox is not idle.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, cast

from typing_extensions import override

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import ConflictError, SandyardError
from sandyard.server.core.ops import DEFAULT, AnswerT, Execute, MakeFolder, Operation, Start
from sandyard.server.core.records import Sandbox
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.lifecycle import is_current, refusal
from sandyard.server.service.sandboxes.pace import FrameRates
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.power import Power
from sandyard.server.service.sandboxes.register import ref_of
from sandyard.server.service.sandboxes.uses import Note, Notes, Use, is_fresh, may_be_noted_late
from sandyard.server.tasks import beside, concurrently, to_the_end

log = logging.getLogger(__name__)

_LONG_S = 2.0
_LOOK_S = 3.0


@dataclass(frozen=True)
class Reached(Generic[AnswerT]):
    """A running sandbox, with an open operation."""

    sandbox: Sandbox
    answer: AnswerT
    stream: "GuestStream"


class GuestStream(ByteStream):
    """A stream from a sandbox whose frames are limited to the pace of the sandbox and its
    organization. It knows whether any data has passed. See core.contracts.node.ByteStream."""

    def __init__(self, stream: ByteStream, sandbox: Sandbox, pace: FrameRates) -> None:
        self._stream = stream
        self._sandbox = sandbox
        self._pace = pace
        self.has_moved = False

    async def spend(self, frames: int) -> None:
        """Count decoded frames, and return once more may be decoded."""
        await asyncio.sleep(0)
        await self._pace.spend(self._sandbox.id, self._sandbox.org_id, frames)

    @override
    async def read(self, limit: int) -> bytes:
        data = await self._stream.read(limit)
        self.has_moved = self.has_moved or bool(data)
        return data

    @override
    async def write(self, data: bytes) -> None:
        self.has_moved = True
        await self._stream.write(data)

    @override
    async def write_eof(self) -> None:
        await self._stream.write_eof()


class Reach:
    """Opens operations in sandboxes."""

    def __init__(
        self,
        platform: Platform,
        *,
        power: Power,
    ) -> None:
        self._pace = FrameRates(platform.clock)
        self._store = platform.store
        self._notes = Notes(platform.store)
        self._register = platform.register
        self._power = power
        self._templates = platform.templates
        self._tunnel = platform.tunnel
        self._clock = platform.clock

    @asynccontextmanager
    async def open(
        self, actor: Actor, reference: str, operation: Operation[AnswerT], use: Use
    ) -> AsyncIterator[Reached[AnswerT]]:
        """Open an operation in a sandbox. A paused sandbox is resumed first.

        If this raises, nothing was started in the sandbox.

        Raises:
            NotFoundError: the actor has no such sandbox.
            ConflictError: it is not running, and must not be resumed.
            LimitReachedError, QuotaExceededError: it may not be resumed.
            InvalidArgumentError: the agent refused; the message is the agent's.
            UnavailableError: node or agent do not answer.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        until = self._power.deadline()
        async with AsyncExitStack() as held:
            attempts, opened = self._register.attempts(sandbox, doing=use.doing), None
            while opened is None:
                sandbox = await self._power.running(
                    await attempts.next(), actor, doing=use.doing, until=until
                )
                asked = await self._completed(sandbox, operation)
                if asked is not operation:
                    use = _with_attributes(use, asked)
                if not await self._note(Note(actor, sandbox, use, self._clock.now()), held):
                    continue
                opening = self._tunnel.open(ref_of(sandbox), asked)
                try:
                    opened = await held.enter_async_context(opening)
                except ConflictError:
                    # If it was paused at this moment, nothing was started: resume it.
                    if (await self._register.reread(sandbox.id)).version == sandbox.version:
                        raise
            began = self._clock.monotonic()
            stream = GuestStream(opened.stream, sandbox, self._pace)
            if operation.used_by_bytes:
                async with concurrently(self._note_bytes(stream, sandbox, use)):
                    yield Reached(sandbox, opened.answer, stream)
                return
            try:
                yield Reached(sandbox, opened.answer, stream)
            finally:
                if self._clock.monotonic() - began > _LONG_S:
                    await self._touch(sandbox, use)

    async def _completed(
        self, sandbox: Sandbox, operation: Operation[AnswerT]
    ) -> Operation[AnswerT]:
        """Return an operation with its template's user and working directory where none is
        named."""
        wish: Any = operation
        if not isinstance(wish, Execute | Start) or DEFAULT not in (wish.user, wish.cwd):
            return operation
        about = await self._templates.about(sandbox.org_id, sandbox.template)
        completed: Any = replace(
            wish,
            user=wish.user or (about and about.user) or "root",
            cwd=wish.cwd or (about and about.workdir) or "/workspace",
        )
        return cast("Operation[AnswerT]", completed)

    async def _note_bytes(self, stream: GuestStream, sandbox: Sandbox, use: Use) -> None:
        """Record a use while data passes, often enough for the sandbox's idle timeout."""
        look_s = min(_LOOK_S, max(0.5, sandbox.idle_timeout_s / 3 or _LOOK_S))
        try:
            while True:
                await self._clock.sleep(look_s)
                if stream.has_moved:
                    stream.has_moved = False
                    await self._touch_if_it_can_be(sandbox, use)
        finally:
            if stream.has_moved and not use.is_frequent:
                await to_the_end(self._touch_if_it_can_be(sandbox, use))

    async def _touch_if_it_can_be(self, sandbox: Sandbox, use: Use) -> None:
        try:
            await self._touch(sandbox, use)
        except SandyardError as error:  # worth less than the connection that it would end
            log.warning("cannot record a use: %s; continuing without", error.message)

    async def id_of(self, actor: Actor, reference: str) -> str:
        """Return a sandbox's id.

        Raises:
            NotFoundError: the actor has no such sandbox.
        """
        actor.require("sandbox:write")
        return (await self._register.get(actor, reference)).id

    async def look(
        self, actor: Actor, reference: str, operation: Operation[AnswerT], *, doing: str
    ) -> AnswerT:
        """Run an operation in a running sandbox without counting as a use; do not wait or resume.

        Raises:
            NotFoundError: the actor has no such sandbox.
            ConflictError: it is not running.
            InvalidArgumentError: the agent refused; the message is the agent's.
            UnavailableError: node or agent do not answer.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        if sandbox.status is not Status.RUNNING:
            raise refusal(sandbox, doing=doing)
        async with self._tunnel.open(ref_of(sandbox), operation) as opened:
            return opened.answer

    async def _note(self, note: Note, held: AsyncExitStack) -> bool:
        """Record a use: before it begins, or while it is in progress if the sandbox cannot be
        paused as idle until then. False if the sandbox has changed since it was read.

        A pause is written the same way, and then checks for a use: whichever comes second sees the
        other.
        """
        sandbox, use = note.sandbox, note.use
        if use.is_frequent and is_fresh(sandbox, use, note.at):
            return True
        if may_be_noted_late(sandbox, note.at):
            await held.enter_async_context(beside(self._notes.write(note)))
            return True
        async with self._store.write(sandbox.org_id) as tx:
            if not await is_current(tx, sandbox):
                return False
            await note.write(tx)
        return True

    async def _touch(self, sandbox: Sandbox, use: Use) -> None:
        async with self._store.write(Turn.SHARED) as tx:
            await tx.activity.touch(sandbox.id, at=self._clock.now(), kind=use.kind)


async def make_folder(
    reach: Reach, actor: Actor, reference: str, path: str, user: str, use: Use
) -> None:
    """Make a directory for a command, and those above it, if they are missing. See `Reach.open`."""
    # By root, as of what a container image names: a user may write in few places.
    wish = MakeFolder(path.encode(), parents=True, owner=user)
    async with reach.open(actor, reference, wish, replace(use, is_in_feed=False)):
        pass


def _with_attributes(use: Use, operation: Any) -> Use:
    """Return a use that also tells the user and the directory of a program."""
    attributes = {"user": operation.user, "cwd": operation.cwd}
    return replace(use, attributes={**attributes, **use.attributes})
