"""Desktops: screens of sandboxes, for people in a browser and for agents."""

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    GuestNotFoundError,
    InvalidArgumentError,
    UnavailableError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.ops import Dial
from sandyard.server.core.records import Sandbox
from sandyard.server.core.wire import RFB_PORT, printable
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.lines import line
from sandyard.server.service.sandboxes.execute import Command, Commands
from sandyard.server.service.sandboxes.keysyms import keysym_of, keysyms_of
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.reach import Reach
from sandyard.server.service.sandboxes.rfb import Screen
from sandyard.server.service.sandboxes.tickets import Tickets
from sandyard.server.service.sandboxes.uses import Use
from sandyard.server.tasks import in_thread

KIND = "desktop"
TEXT_MAX = 10_000
_USE = Use("desktop", "", "look at the desktop of", is_in_feed=False)
_LIMIT_S = 20.0
_BUTTONS = {"left": 1, "middle": 2, "right": 4}
_WHEEL = {"up": 8, "down": 16, "left": 32, "right": 64}
_CLICKS = range(1, 6)
_NOTCHES_MAX = 100
_STEPS = 12
_STEP_S = 0.015
_KEYS_AT_ONCE = 20
_PICTURES_AT_ONCE = 4
_PICTURES_OF_ALL = 8
_THERE_S, _THERE_TRIES = 0.5, 30
_SAID_MAX = 256 * 1024
_ID = re.compile(r"0x[0-9a-f]{1,16}")
_ACTIVE = re.compile(r"[0-9]{1,20}")
_WINDOWS = "DISPLAY=:0 wmctrl -lGpx; DISPLAY=:0 xdotool getactivewindow"
_WINDOWS_MAX = 500


@dataclass(frozen=True)
class DesktopTicket:
    """A one-time ticket for a desktop, valid for a minute."""

    secret: str
    sandbox_id: str
    expires_at: datetime


@dataclass(frozen=True)
class Window:
    """A window on a screen."""

    id: str
    title: str
    program: str
    pid: int
    x: int
    y: int
    width: int
    height: int
    is_active: bool


@dataclass(frozen=True)
class Point:
    """A point on a screen, from its upper left corner."""

    x: int
    y: int


class Desktops:
    """Issues tickets, opens screens, and controls pointer and keyboard."""

    def __init__(
        self,
        platform: Platform,
        *,
        reach: Reach,
        commands: Commands,
        tickets: Tickets,
        addresses: Addresses,
    ) -> None:
        self._store = platform.store
        self._register = platform.register
        self._reach = reach
        self._commands = commands
        self._tickets = tickets
        self._addresses = addresses
        self._clock = platform.clock
        self._pictures = defaultdict[str, asyncio.Semaphore](
            lambda: asyncio.Semaphore(_PICTURES_AT_ONCE)
        )
        self._pictures_of_all = asyncio.Semaphore(_PICTURES_OF_ALL)

    # --- for people -------------------------------------------------------------------------

    async def issue(self, actor: Actor, reference: str) -> DesktopTicket:
        """Create a ticket for a desktop.

        Raises:
            NotFoundError: the actor has no such sandbox.
            ConflictError: it has no desktop.
        """
        actor.require("sandbox:write")
        sandbox = await self._with_desktop(actor, reference)
        issued = await self._tickets.issue(actor, sandbox, KIND)
        return DesktopTicket(issued.secret, sandbox.id, issued.expires_at)

    async def check(self, admission: Admission) -> None:
        """Return if the ticket's issuer still has the right. See `Tickets.check`."""
        await self._tickets.check(admission)

    @asynccontextmanager
    async def open(self, admission: Admission) -> AsyncIterator[ByteStream]:
        """Open a ticket's screen as an RFB stream.

        Raises:
            UnavailableError: the screen is not available yet.
            For the rest see `Reach.open`.
        """
        async with self._dial(admission.actor, admission.sandbox_id) as stream:
            async with self._store.write(Turn.SHARED) as tx:
                await tx.activity.append(
                    line(
                        "sandbox.vnc.connected",
                        "Desktop opened",
                        org_id=admission.actor.org_id,
                        actor=admission.actor,
                        resource_id=admission.sandbox_id,
                        at=self._clock.now(),
                        sandbox_id=admission.sandbox_id,
                    )
                )
            yield stream

    # --- for agents -------------------------------------------------------------------------

    async def screenshot(self, actor: Actor, reference: str) -> bytes:
        """Return a screenshot as PNG.

        Raises: see `open`; ConflictError: the sandbox has no desktop.
        """
        # Each may use a hundred MB while it is made; no organization may use all places.
        async with self._pictures[actor.org_id], self._pictures_of_all:
            async with self._screen(actor, reference) as screen:
                picture = await screen.picture()
            return await in_thread(picture.png)

    async def click(
        self, actor: Actor, reference: str, place: Point, button: str, count: int
    ) -> None:
        """Click at a point, once or several times.

        Raises: see `screenshot`; InvalidArgumentError: the point or button is invalid.
        """
        if button not in _BUTTONS:
            raise InvalidArgumentError("cannot click: button is left, middle or right",
                                       field="button")  # fmt: skip
        if count not in _CLICKS:
            raise InvalidArgumentError("cannot click so often: count is 1 to 5", field="count")
        async with self._screen(actor, reference) as screen:
            _check(screen, place)
            await screen.point(place.x, place.y, 0)
            for _ in range(count):
                await screen.point(place.x, place.y, _BUTTONS[button])
                await screen.point(place.x, place.y, 0)
            await screen.settle()

    async def move(self, actor: Actor, reference: str, place: Point) -> None:
        """Move the pointer to a point. Raises: see `click`."""
        async with self._screen(actor, reference) as screen:
            _check(screen, place)
            await screen.point(place.x, place.y, 0)
            await screen.settle()

    async def drag(
        self, actor: Actor, reference: str, source: Point, target: Point, button: str
    ) -> None:
        """Press a button at one point and release it at another. Raises: see `click`."""
        if button not in _BUTTONS:
            raise InvalidArgumentError("cannot drag: button is left, middle or right",
                                       field="button")  # fmt: skip
        held = _BUTTONS[button]
        async with self._screen(actor, reference) as screen:
            _check(screen, source)
            _check(screen, target)
            await screen.point(source.x, source.y, 0)
            await screen.point(source.x, source.y, held)
            # In steps: programs want to see that something is being dragged.
            for step in range(1, _STEPS + 1):
                x = source.x + (target.x - source.x) * step // _STEPS
                y = source.y + (target.y - source.y) * step // _STEPS
                await screen.point(x, y, held)
                await self._clock.sleep(_STEP_S)
            await screen.point(target.x, target.y, 0)
            await screen.settle()

    async def scroll(
        self, actor: Actor, reference: str, place: Point, right: int, down: int
    ) -> None:
        """Scroll at a point, in notches. Negative values scroll left or up.

        Raises: see `click`.
        """
        if max(abs(right), abs(down)) > _NOTCHES_MAX:
            raise InvalidArgumentError(
                f"cannot scroll so far: at most {_NOTCHES_MAX} notches at once", field="dy"
            )
        turns = [_WHEEL["right" if right > 0 else "left"]] * abs(right)
        turns += [_WHEEL["down" if down > 0 else "up"]] * abs(down)
        async with self._screen(actor, reference) as screen:
            _check(screen, place)
            await screen.point(place.x, place.y, 0)
            for wheel in turns:
                await screen.point(place.x, place.y, wheel)
                await screen.point(place.x, place.y, 0)
            await screen.settle()

    async def type(self, actor: Actor, reference: str, text: str) -> None:
        """Type text into the focused window.

        Raises: see `screenshot`; InvalidArgumentError: it is too long, or cannot be typed.
        """
        checked_text(text, field="text")
        if len(text) > TEXT_MAX:
            raise InvalidArgumentError(
                f"cannot type over {TEXT_MAX} characters at once: send it in pieces", field="text"
            )
        if any(ord(one) < 0x20 and one not in "\r\n\t" for one in text):
            raise InvalidArgumentError(
                "cannot type control characters: press keys instead", field="text"
            )
        async with self._screen(actor, reference) as screen:
            for number, one in enumerate(text.replace("\r\n", "\n"), 1):
                await screen.press(keysym_of(one), is_down=True)
                await screen.press(keysym_of(one), is_down=False)
                if number % _KEYS_AT_ONCE == 0:
                    # A program that is busy loses what comes faster than it reads.
                    await screen.settle()
            await screen.settle()

    async def press(self, actor: Actor, reference: str, keys: str) -> None:
        """Press a combination of keys, such as `ctrl+c`. Raises: see `type`."""
        found = keysyms_of(checked_text(keys, field="keys"))
        async with self._screen(actor, reference) as screen:
            for keysym in found:
                await screen.press(keysym, is_down=True)
            for keysym in reversed(found):
                await screen.press(keysym, is_down=False)
            await screen.settle()

    async def windows(self, actor: Actor, reference: str) -> list[Window]:
        """Return the windows, oldest first. Raises: see `screenshot`."""
        actor.require("sandbox:write")
        sandbox = await self._with_desktop(actor, reference)
        command = Command(_WINDOWS, 10_000, "/", {}, None, "user")
        outcome = await self._commands.execute(actor, sandbox.id, command)
        return windows_in(outcome.stdout[-_SAID_MAX:].decode("utf-8", "replace"))

    # --- what they stand on -----------------------------------------------------------------

    async def _with_desktop(self, actor: Actor, reference: str) -> Sandbox:
        sandbox = await self._register.get(actor, reference)
        if not self._addresses.has_desktop(sandbox):
            raise ConflictError(
                f"cannot show a desktop: {sandbox.id} has none; create one from a template that "
                "does, such as desktop-ubuntu",
                status=sandbox.status.value,
            )
        return sandbox

    @asynccontextmanager
    async def _dial(self, actor: Actor, sandbox_id: str) -> AsyncIterator[ByteStream]:
        async with AsyncExitStack() as held:
            for left in reversed(range(_THERE_TRIES)):
                try:
                    opening = self._reach.open(actor, sandbox_id, Dial(RFB_PORT), _USE)
                    reached = await held.enter_async_context(opening)
                    break
                except GuestNotFoundError as error:
                    if not left:
                        raise UnavailableError(
                            "cannot show the desktop yet: it is starting; try again in a few "
                            "seconds"
                        ) from error
                # A machine that was booted just now has no screen for its first seconds.
                await self._clock.sleep(_THERE_S)
            yield reached.stream

    @asynccontextmanager
    async def _screen(self, actor: Actor, reference: str) -> AsyncIterator[Screen]:
        actor.require("sandbox:write")
        sandbox = await self._with_desktop(actor, reference)
        try:
            async with self._dial(actor, sandbox.id) as stream, self._clock.timeout(_LIMIT_S):
                screen = Screen(stream)
                await screen.meet()
                yield screen
        except TimeoutError as error:
            raise DeadlineExceededError(
                "cannot wait longer for the screen of the sandbox: it is very busy; try again"
            ) from error


def windows_in(output: str) -> list[Window]:
    """Return the windows listed by wmctrl(1), with the active one by xdotool(1)."""
    lines = output.splitlines()
    last = lines[-1].strip() if lines else ""
    active = int(last) if _ACTIVE.fullmatch(last) else None
    found = []
    for text in lines[:_WINDOWS_MAX]:
        words = text.split(None, 9)
        if len(words) < 9 or not _ID.fullmatch(words[0]):
            continue
        try:
            number = int(words[0], 16)
            pid, x, y, width, height = (int(one) for one in words[2:7])
        except ValueError:
            continue
        title = printable(words[9] if len(words) > 9 else "")[:500]
        program = printable(words[7].rpartition(".")[2])[:200]
        found.append(Window(words[0], title, program, pid, x, y, width, height, number == active))
    return found


def _check(screen: Screen, place: Point) -> None:
    if not (0 <= place.x < screen.width and 0 <= place.y < screen.height):
        raise InvalidArgumentError(
            f"cannot point there: the screen is {screen.width} x {screen.height}", field="x"
        )
