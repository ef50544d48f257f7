"""Contexts: interpreters in sandboxes that run one piece of code after another, and keep what it
defined.

A context is a process in its sandbox, found by its tag, which is the context's id. So it survives
pauses and servers, and any client finds it.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from sandyard.server.core import ops
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import (
    ConflictError,
    GuestNotFoundError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ops import Program
from sandyard.server.service.actor import Actor
from sandyard.server.service.repeats import Repeatable, Repeats
from sandyard.server.service.sandboxes.interpreters import LANGUAGES, argv_of, request_of
from sandyard.server.service.sandboxes.processes import Following, NewProcess, Processes, Which
from sandyard.server.service.sandboxes.reports import CodeError, Finished, Report, Reports
from sandyard.server.service.sandboxes.uses import Use
from sandyard.server.tasks import concurrently, to_the_end

CODE_MAX = 1024 * 1024
TIMEOUT_MS = range(1, 86_400_001)
_TAG = "context"
_ID_PARTS = 3
_GRACE_S = 3.0
_BEGIN_S = 3600.0
"""How long code may wait for its turn where another server's runs."""
_SOON_S = 5.0
"""Within which code usually begins, so that what is wrong is the answer's status."""
_STOP_S = 15.0
"""How long code whose client has left may take to begin, to be interrupted then."""
_WAITING_MAX = 2
"""Reports that wait to be sent; one may be large."""
_START = Use("process", "Context created", "create a context in")
_RUN = Use("exec", "Code run", "run code in")
_LOOK = Use("process", "", "use a context in", is_in_feed=False)


@dataclass(frozen=True)
class Context:
    """An interpreter. `created_ms` is when it was last started, since the epoch."""

    id: str
    language: str
    cwd: str
    user: str
    created_ms: int
    has_ended: bool = field(repr=False)


@dataclass(frozen=True)
class Piece:
    """A piece of code, what its `input()` reads, and its time limit from its beginning."""

    code: str = field(repr=False)
    stdin: str = field(repr=False)
    timeout_ms: int


@dataclass(frozen=True)
class Place:
    """Where a context is. A fork has the same contexts as its origin, under the same ids."""

    sandbox_id: str
    context_id: str


class Contexts:
    """Creates and uses contexts."""

    def __init__(self, processes: Processes, clock: Clock, repeats: Repeats) -> None:
        self._processes = processes
        self.clock = clock
        self._repeats = repeats
        # Each exists while it is held or waited for.
        self._turns: WeakValueDictionary[Place, asyncio.Lock] = WeakValueDictionary()

    async def create(
        self,
        actor: Actor,
        reference: str,
        language: str,
        *,
        cwd: str,
        user: str,
        request: Repeatable | None = None,
    ) -> Context:
        """Start an interpreter. A repeated `request` finds the first one.

        Raises: see `Processes.start`; InvalidArgumentError: the language is unknown, or its
            interpreter is not in the sandbox.
        """
        argv = argv_of(language)
        self._repeats.check(request)
        word = secrets.token_hex(8)
        if request is not None:
            word = self._repeats.secret_of(actor, request)[: len(word)]
        wish = _wish_of(f"{_TAG}-{language}-{word}", argv, cwd=cwd, user=user)
        started = await self._processes.start(actor, reference, wish, request=request, use=_START)
        # What a repeated request finds may have been replaced, and so have lost its tag.
        return _context_of(replace(started, tag=wish.tag))

    async def list(self, actor: Actor, reference: str) -> list[Context]:
        """Return the contexts of a sandbox, oldest first. One whose interpreter has ended is none.
        See `Processes.list`."""
        found = await self._processes.list(actor, reference)
        contexts = (_context_of(one) for one in found.items if _language_of(one.tag))
        return [one for one in contexts if not one.has_ended]

    async def get(self, actor: Actor, reference: str, context_id: str) -> Context:
        """Return one context.

        Raises:
            NotFoundError: there is none.
            For the rest see `Processes.get`.
        """
        _check_id(context_id)
        found = await self._look(actor, reference, context_id)
        if found.has_ended:
            raise _absent(context_id)
        return found

    async def _look(self, actor: Actor, reference: str, context_id: str) -> Context:
        with _named(context_id):
            return _context_of(await self._processes.get(actor, reference, Which(tag=context_id)))

    async def restart(self, actor: Actor, reference: str, context_id: str) -> Context:
        """Replace a context's interpreter by a new one, which knows nothing. A paused sandbox is
        resumed. See `get`."""
        place = await self._place(actor, reference, context_id)
        with _named(context_id):
            # It finds the pid, and resumes a paused sandbox.
            pid = await self._signal(actor, place, "SIGCONT", everything=False)
            await self._succeed(actor, place, pid)
            await self._end(actor, place, pid)
            return await self.get(actor, place.sandbox_id, context_id)

    async def interrupt(self, actor: Actor, reference: str, context_id: str) -> None:
        """Interrupt the code that a context runs, if it runs any. A paused sandbox is resumed. See
        `get`."""
        place = await self._place(actor, reference, context_id)
        with _named(context_id):
            await self.send_interrupt(actor, place)

    async def delete(self, actor: Actor, reference: str, context_id: str) -> None:
        """End a context, with everything that its code has started. A paused sandbox is resumed.
        See `get`."""
        place = await self._place(actor, reference, context_id)
        with _named(context_id):
            # Without its tag it is no context, and is not replaced by those who see it end.
            await self._signal(actor, place, "SIGKILL", everything=True, forgets_tag=True)

    async def _place(self, actor: Actor, reference: str, context_id: str) -> Place:
        _check_id(context_id)
        return Place(await self._processes.sandbox_of(actor, reference), context_id)

    @asynccontextmanager
    async def run(
        self, actor: Actor, reference: str, context_id: str, piece: Piece
    ) -> AsyncIterator[AsyncIterator[Report]]:
        """Run a piece of code, and yield what it reports, up to its end. A paused sandbox is
        resumed. If this is cancelled, the code is interrupted. Code that goes on after an
        interruption is ended with its interpreter, and a new one takes its place.

        Raises:
            InvalidArgumentError: the piece is invalid.
            For the rest see `get`.
        """
        _check(piece)
        drive = _Drive(self, actor, await self._place(actor, reference, context_id), piece)
        async with concurrently(drive.work()):
            await drive.opened.wait()
            if drive.failed is not None:
                raise drive.failed
            yield drive.reports()

    def turn(self, place: Place) -> asyncio.Lock:
        """Return what one piece of code at a time holds."""
        return self._turns.setdefault(place, asyncio.Lock())

    @asynccontextmanager
    async def attached(self, actor: Actor, place: Place, mark: str) -> "AsyncIterator[_Run]":
        """Follow an interpreter that is to run a piece of code. See `Processes.follow`."""
        which = Which(tag=place.context_id)
        async with self._processes.follow(actor, place.sandbox_id, which, None, use=_RUN) as found:
            yield _Run(found, Reports(mark))

    async def send_interrupt(self, actor: Actor, place: Place) -> None:
        """Interrupt the code that an interpreter runs.

        Raises:
            NotFoundError: the interpreter has ended.
        """
        # A shell waits for the program that it runs.
        is_shell = _language_of(place.context_id) == "bash"
        await self._signal(actor, place, "SIGINT", everything=is_shell)

    async def renew(self, actor: Actor, place: Place, pid: int) -> None:
        """End an interpreter, if it has not ended yet, and start its successor, unless another has
        done so, or the context was deleted."""
        try:
            # The successor comes first: without one the context would seem to be gone.
            await self._succeed(actor, place, pid)
        finally:
            await self._end(actor, place, pid)

    async def _succeed(self, actor: Actor, place: Place, pid: int) -> None:
        """Start the successor of an interpreter, unless another has done so."""
        with suppress(NotFoundError):
            found = await self._look(actor, place.sandbox_id, place.context_id)
            argv = argv_of(found.language)
            wish = _wish_of(found.id, argv, cwd=found.cwd, user=found.user, replaces=pid)
            await self._processes.start(actor, place.sandbox_id, wish, use=_LOOK)

    async def _end(self, actor: Actor, place: Place, pid: int) -> None:
        with suppress(NotFoundError):
            await self._signal(actor, place, "SIGKILL", pid=pid, everything=True)

    async def _signal(
        self,
        actor: Actor,
        place: Place,
        name: str,
        *,
        everything: bool,
        forgets_tag: bool = False,
        pid: int | None = None,
    ) -> int:
        """Send a signal to an interpreter, the present one without a `pid`. Return its pid."""
        which = Which(tag=place.context_id) if pid is None else Which(pid)
        try:
            found, _ = await self._processes.signal(
                actor,
                place.sandbox_id,
                which,
                name,
                everything=everything,
                forgets_tag=forgets_tag,
                use=_LOOK,
            )
        except ConflictError as error:
            if error.facts.get("reason") is None:  # the sandbox's, not the process's
                raise
            raise _absent(place.context_id) from error
        return found


class _Drive:
    """Runs a piece of code. `work` is to be run meanwhile.

    `opened` is set once it is known whether that can begin, or waits for its turn.
    """

    def __init__(self, contexts: Contexts, actor: Actor, place: Place, piece: Piece) -> None:
        self._contexts = contexts
        self._clock = contexts.clock
        self._where = (actor, place)
        self._place = place
        self._language = _language_of(place.context_id) or ""
        self._piece = piece
        # A shell can lose a signal that arrives while it starts a program.
        self._waits = [_GRACE_S / 6] * 6 if self._language == "bash" else [_GRACE_S]
        self._reported: asyncio.Queue[Report | Exception] = asyncio.Queue(_WAITING_MAX)
        self.opened = asyncio.Event()
        self.failed: Exception | None = None

    async def reports(self) -> AsyncIterator[Report]:
        """Yield what the code reports, up to its end."""
        while True:
            found = await self._reported.get()
            if isinstance(found, Exception):
                raise found
            yield found
            if isinstance(found, Finished):
                return

    async def work(self) -> None:
        """Run the code. An error is raised by those who take the reports."""
        turn = self._contexts.turn(self._place)
        try:
            if turn.locked():
                self.opened.set()
            async with AsyncExitStack() as held:
                async with self._clock.timeout(_BEGIN_S):
                    await held.enter_async_context(turn)
                await self._run()
        except TimeoutError:
            await self._fail(UnavailableError("cannot run the code now: the context is busy"))
        except Exception as error:  # noqa: BLE001 - see above
            await self._fail(error)

    async def _fail(self, error: Exception) -> None:
        if self.opened.is_set():
            await self._reported.put(error)
        self.failed = error
        self.opened.set()

    async def _run(self) -> None:
        mark, context_id, is_asked = secrets.token_hex(16), self._place.context_id, False
        async with AsyncExitStack() as held:
            held.enter_context(_named(context_id))
            run = await held.enter_async_context(self._contexts.attached(*self._where, mark))
            await held.enter_async_context(concurrently(run.hear()))
            piece = self._piece
            asked = request_of(self._language, mark, piece.code, piece.stdin, piece.timeout_ms)
            try:
                async with self._clock.timeout(_BEGIN_S):
                    is_asked = True
                    await run.ask(asked)
                    with suppress(TimeoutError):
                        async with self._clock.timeout(_SOON_S):
                            await run.begun.wait()
                    if run.has_died_before:
                        # Unless it was restarted just then.
                        actor, place = self._where
                        await self._contexts.get(actor, place.sandbox_id, context_id)
                    self.opened.set()
                    await run.begun.wait()
                await self._pass_on(run)
            finally:
                if is_asked and not run.is_over:
                    await to_the_end(self._stop(run))

    async def _pass_on(self, run: "_Run") -> None:
        """Pass on the reports of code that has begun, and interrupt it at its time limit."""
        limit_s, now = self._piece.timeout_ms / 1000, self._clock.monotonic
        late = Finished(CodeError("TimeoutError", f"it took over {limit_s:g} s", ""))
        until, is_late, waits = now() + limit_s, False, iter(self._waits)
        while True:
            try:
                async with self._clock.timeout(max(0.0, until - now())):
                    report = await run.next()
            except TimeoutError:
                is_late = True
                if (wait := next(waits, None)) is not None:
                    with suppress(NotFoundError):  # it has ended
                        await self._contexts.send_interrupt(*self._where)
                    until = now() + wait
                    continue
                run.is_over = True
                await to_the_end(self._contexts.renew(*self._where, run.pid))
                report = late
            except _DiedError as error:
                with suppress(SandyardError):  # the sandbox may have ended as well
                    await to_the_end(self._contexts.renew(*self._where, run.pid))
                report = Finished(CodeError("InterpreterEnded", str(error), ""))
            if isinstance(report, Finished):
                await self._reported.put(late if is_late else report)
                return
            await self._reported.put(report)

    async def _stop(self, run: "_Run") -> None:
        """Interrupt code whose client has left, once it has begun, and if that is not enough
        replace the interpreter."""
        with suppress(SandyardError, TimeoutError):
            async with self._clock.timeout(_STOP_S):
                await run.begun.wait()
            with suppress(_DiedError):
                for wait in self._waits:
                    with suppress(NotFoundError):  # it has ended
                        await self._contexts.send_interrupt(*self._where)
                    with suppress(TimeoutError):
                        async with self._clock.timeout(wait):
                            while not isinstance(await run.next(), Finished):
                                pass
                        return
            await self._contexts.renew(*self._where, run.pid)


class _DiedError(Exception):
    """The interpreter has ended."""


class _Run:
    """A piece of code that runs. `hear` is to be run meanwhile."""

    def __init__(self, following: Following, reports: Reports) -> None:
        self.pid = following.pid
        self._following = following
        self._reports = reports
        self._heard: asyncio.Queue[Report | Exception] = asyncio.Queue(_WAITING_MAX)
        self.begun = asyncio.Event()
        self.has_died_before = False
        self.is_over = False

    async def ask(self, asked: bytes) -> None:
        """Send the piece of code."""
        await self._following.write(asked)

    async def hear(self) -> None:
        """Read what the interpreter prints, up to the end of the piece."""
        try:
            async for event in self._following.events():
                if isinstance(event, ops.Ended):
                    how = event.signal or f"exit code {event.exit_code}"
                    reason = f": {self._reports.last_words}" if self._reports.last_words else ""
                    raise _DiedError(
                        f"the interpreter ended ({how}), and with it what it knew{reason}"
                    )
                for report in self._reports.feed(event.stream, event.data):
                    await self._heard.put(report)
                if self._reports.has_begun:
                    self.begun.set()
        except Exception as error:  # noqa: BLE001 - it is raised where reports are taken
            self.is_over = self.has_died_before = (
                isinstance(error, _DiedError) and not self.begun.is_set()
            )
            self.begun.set()
            await self._heard.put(error)

    async def next(self) -> Report:
        """Return the next report.

        Raises:
            _DiedError: the interpreter has ended.
            ConflictError: the sandbox was paused or ended.
            UnavailableError: the agent is gone.
        """
        found = await self._heard.get()
        if isinstance(found, Exception):
            self.is_over = True
            raise found
        self.is_over = isinstance(found, Finished)
        return found


@contextmanager
def _named(context_id: str) -> Iterator[None]:
    """Name a context, and not its process, as what does not exist."""
    try:
        yield
    except GuestNotFoundError as error:
        raise _absent(context_id) from error


def _wish_of(
    tag: str, argv: tuple[str, ...], *, cwd: str, user: str, replaces: int | None = None
) -> NewProcess:
    return NewProcess(
        command=None,
        argv=argv,
        cwd=cwd,
        env={},
        user=user,
        tag=tag,
        stdin=True,
        terminal=None,
        timeout=None,
        replaces=replaces,
    )


def _language_of(tag: str | None) -> str | None:
    """Return the language of the context with this tag, None if it is no context's."""
    parts = (tag or "").split("-")
    is_one = len(parts) == _ID_PARTS and parts[0] == _TAG and parts[1] in LANGUAGES and parts[2]
    return parts[1] if is_one else None


def _context_of(program: Program) -> Context:
    tag = program.tag or ""
    return Context(
        id=tag,
        language=_language_of(tag) or "",
        cwd=program.cwd,
        user=program.user,
        created_ms=program.started_ms,
        has_ended=program.end is not None,
    )


def _absent(context_id: str) -> NotFoundError:
    return NotFoundError(
        f"cannot find the context {context_id[:80]!r}: it was deleted, or ended with its sandbox's "
        "machine; create another",
        reason="no_context",
    )


def _check_id(context_id: str) -> None:
    if not _language_of(context_id):
        raise _absent(context_id)


def _check(piece: Piece) -> None:
    for name, text in (("code", piece.code), ("stdin", piece.stdin)):
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                "cannot take {field}: it is not valid Unicode (a lone surrogate); remove it",
                field=name,
            ) from error
        if size > CODE_MAX:
            raise InvalidArgumentError("cannot take over 1 MiB of {field}", field=name)
    if piece.timeout_ms not in TIMEOUT_MS:
        raise InvalidArgumentError(
            "cannot use {field}: it must be 1 to 86400000 milliseconds", field="timeout"
        )
