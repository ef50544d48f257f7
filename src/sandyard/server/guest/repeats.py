"""Starts with a key: a repeated start finds the process of the first, and starts none."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256

from sandyard.server.core import ops
from sandyard.server.core.codec import encode
from sandyard.server.guest.system import ReusedKeyError
from sandyard.server.guest.table import Entry

_KEPT_S = 86_400.0
_KEPT_MAX = 4096


class _Begun:
    """A start with a key. `entry` is None while it is in progress."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.entry: Entry | None = None
        self.at = time.monotonic()
        self.decided = asyncio.Event()


class Repeats:
    """The starts that one agent remembers: the last few thousand of a day, oldest first."""

    def __init__(self) -> None:
        self._known: dict[str, _Begun] = {}

    async def once(self, wish: ops.Start, begin: Callable[[], Awaitable[Entry]]) -> Entry:
        """Return the process that `begin` starts, or the one that an equal start with the same key
        has started before. A start that failed is forgotten.

        Raises:
            ReusedKeyError: the key was used for a different start.
        """
        if wish.key is None:
            return await begin()
        self._sweep()
        digest = sha256(json.dumps(encode(wish), sort_keys=True).encode()).digest()
        while (known := self._known.get(wish.key)) is not None:
            if known.digest != digest:
                raise ReusedKeyError("the key was used to start another process")
            if known.entry is not None:
                return known.entry
            await known.decided.wait()
        begun = self._known[wish.key] = _Begun(digest)
        try:
            begun.entry = await begin()
        except BaseException:
            del self._known[wish.key]
            raise
        finally:
            begun.decided.set()
        return begun.entry

    def _sweep(self) -> None:
        now = time.monotonic()
        for key, one in list(self._known.items()):
            if len(self._known) <= _KEPT_MAX and now - one.at <= _KEPT_S:
                return
            if one.entry is not None:
                del self._known[key]
