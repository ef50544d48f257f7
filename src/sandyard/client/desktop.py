"""The screen of a sandbox: screenshots, pointer and keyboard."""

from typing import Any

from sandyard.client.calls import Call
from sandyard.client.models import WindowInfo
from sandyard.client.transport import AsyncTransport, Transport

_PICTURE_S = 60.0


class Desktop:
    """A screen, and actions on it. Coordinates are pixels from the upper left corner."""

    def __init__(self, transport: Transport, path: str) -> None:
        self._transport = transport
        self._path = f"{path}/desktop"

    def screenshot(self) -> bytes:
        """Return a screenshot as PNG.

        Raises:
            ApiError: the sandbox has no screen, or it is still starting.
        """
        with self._transport.stream(_picture(self._path)) as answer:
            return answer.read()

    def click(self, x: int, y: int, *, button: str = "left", count: int = 1) -> None:
        """Click at a point. `button` is left, middle or right; a `count` of 2 is a double click."""
        body = {"x": x, "y": y, "button": button, "count": count}
        self._transport.send(_done(self._path, "click", body))

    def move(self, x: int, y: int) -> None:
        """Move the pointer to a point."""
        self._transport.send(_done(self._path, "move", {"x": x, "y": y}))

    def drag(
        self, source: tuple[int, int], target: tuple[int, int], *, button: str = "left"
    ) -> None:
        """Press a button at one point, and release it at another."""
        self._transport.send(_done(self._path, "drag", _way(source, target, button)))

    def scroll(self, x: int, y: int, *, dx: int = 0, dy: int = 0) -> None:
        """Scroll at a point, in notches. Negative values scroll left or up."""
        self._transport.send(_done(self._path, "scroll", {"x": x, "y": y, "dx": dx, "dy": dy}))

    def type(self, text: str) -> None:
        """Type text into the focused window."""
        self._transport.send(_done(self._path, "type", {"text": text}))

    def press(self, keys: str) -> None:
        """Press a combination of keys, such as `Return` or `ctrl+shift+t`."""
        self._transport.send(_done(self._path, "key", {"keys": keys}))

    def windows(self) -> list[WindowInfo]:
        """Return the windows, oldest first."""
        return self._transport.send(_windows(self._path))


class AsyncDesktop:
    """See `Desktop`."""

    def __init__(self, transport: AsyncTransport, path: str) -> None:
        self._transport = transport
        self._path = f"{path}/desktop"

    async def screenshot(self) -> bytes:
        """See `Desktop.screenshot`."""
        async with self._transport.stream(_picture(self._path)) as answer:
            return await answer.aread()

    async def click(self, x: int, y: int, *, button: str = "left", count: int = 1) -> None:
        """See `Desktop.click`."""
        body = {"x": x, "y": y, "button": button, "count": count}
        await self._transport.send(_done(self._path, "click", body))

    async def move(self, x: int, y: int) -> None:
        """See `Desktop.move`."""
        await self._transport.send(_done(self._path, "move", {"x": x, "y": y}))

    async def drag(
        self, source: tuple[int, int], target: tuple[int, int], *, button: str = "left"
    ) -> None:
        """See `Desktop.drag`."""
        await self._transport.send(_done(self._path, "drag", _way(source, target, button)))

    async def scroll(self, x: int, y: int, *, dx: int = 0, dy: int = 0) -> None:
        """See `Desktop.scroll`."""
        body = {"x": x, "y": y, "dx": dx, "dy": dy}
        await self._transport.send(_done(self._path, "scroll", body))

    async def type(self, text: str) -> None:
        """See `Desktop.type`."""
        await self._transport.send(_done(self._path, "type", {"text": text}))

    async def press(self, keys: str) -> None:
        """See `Desktop.press`."""
        await self._transport.send(_done(self._path, "key", {"keys": keys}))

    async def windows(self) -> list[WindowInfo]:
        """See `Desktop.windows`."""
        return await self._transport.send(_windows(self._path))


def _picture(path: str) -> Call[bool]:
    return Call("GET", f"{path}/screenshot", bool, limit_s=_PICTURE_S, safe=True)


def _done(path: str, action: str, body: dict[str, Any]) -> Call[bool]:
    # Not safe: typing or clicking twice would be wrong.
    return Call("POST", f"{path}/{action}", lambda answer: bool(answer["data"]), body=body)


def _way(source: tuple[int, int], target: tuple[int, int], button: str) -> dict[str, Any]:
    (from_x, from_y), (to_x, to_y) = source, target
    return {"fromX": from_x, "fromY": from_y, "toX": to_x, "toY": to_y, "button": button}


def _windows(path: str) -> Call[list[WindowInfo]]:
    return Call("GET", f"{path}/windows", _read_windows, safe=True)


def _read_windows(answer: Any) -> list[WindowInfo]:
    return [
        WindowInfo(
            id=one["id"],
            title=one["title"],
            program=one["program"],
            pid=one["pid"],
            x=one["x"],
            y=one["y"],
            width=one["width"],
            height=one["height"],
            is_active=one["isActive"],
        )
        for one in answer["data"]
    ]
