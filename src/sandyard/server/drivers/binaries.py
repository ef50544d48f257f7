"""The programs of hypervisors."""

import os
import shutil
from collections.abc import Awaitable, Callable

from sandyard.server.core.errors import UnavailableError


class Binary:
    """A program, whose version is determined again when its file has changed: packages are upgraded
    while a server runs.

    `read` returns the version of the program at a path.
    """

    def __init__(self, name: str, read: Callable[[str], Awaitable[str]]) -> None:
        self.name = name
        self._read = read
        self._known: tuple[tuple[str, int, int, int], str] | None = None

    async def version(self) -> str:
        """Return its version.

        Raises:
            UnavailableError: it is not installed, or does not tell.
        """
        path = shutil.which(self.name)
        if path is None:
            raise UnavailableError(f"cannot find {self.name}")
        found = os.stat(path)
        stamp = (os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns)
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, await self._read(path)
        return self._known[1]
