"""The screen of a sandbox: screenshots, pointer and keyboard."""

from sandyard.client import desktop
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.models import WindowInfo


class AsyncDesktop:
    """A screen, and actions on it. Coordinates are pixels from the upper left corner."""

    def __init__(self, transport: AsyncTransport, path: str) -> None:
        self._transport = transport
        self._path = f"{path}/desktop"

    async def screenshot(self) -> bytes:
        """Return a screenshot as PNG.

        Raises:
            ApiError: the sandbox has no screen, or it is still starting.
        """
        async with self._transport.stream(desktop.picture(self._path)) as answer:
            return await answer.aread()

    async def click(self, x: int, y: int, *, button: str = "left", count: int = 1) -> None:
        """Click at a point. `button` is left, middle or right; a `count` of 2 is a double click."""
        body = {"x": x, "y": y, "button": button, "count": count}
        await self._transport.send(desktop.act(self._path, "click", body))

    async def move(self, x: int, y: int) -> None:
        """Move the pointer to a point."""
        await self._transport.send(desktop.act(self._path, "move", {"x": x, "y": y}))

    async def drag(
        self, source: tuple[int, int], target: tuple[int, int], *, button: str = "left"
    ) -> None:
        """Press a button at one point, and release it at another."""
        await self._transport.send(
            desktop.act(self._path, "drag", desktop.way(source, target, button))
        )

    async def scroll(self, x: int, y: int, *, dx: int = 0, dy: int = 0) -> None:
        """Scroll at a point, in notches. Negative values scroll left or up."""
        body = {"x": x, "y": y, "dx": dx, "dy": dy}
        await self._transport.send(desktop.act(self._path, "scroll", body))

    async def type(self, text: str) -> None:
        """Type text into the focused window."""
        await self._transport.send(desktop.act(self._path, "type", {"text": text}))

    async def press(self, keys: str) -> None:
        """Press a combination of keys, such as `Return` or `ctrl+shift+t`."""
        await self._transport.send(desktop.act(self._path, "key", {"keys": keys}))

    async def windows(self) -> list[WindowInfo]:
        """Return the windows, oldest first."""
        return await self._transport.send(desktop.windows(self._path))
