"""How a guest came to its end, as its kernel says it last: hypervisors tell only that it has.

A guest may print what it likes; what it says here concerns nobody but itself.
"""

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sandyard.server.core.contracts.node import POWERED_OFF, REBOOTED
from sandyard.server.drivers.contract import End

TAIL = 64 * 1024
PANICKED = End("guest_panicked", "the guest's kernel panicked; see the sandbox's log")
_REBOOTED = End(REBOOTED, "the guest was rebooted from inside")
HALTED = End(POWERED_OFF, "the guest was powered off from inside; resume boots it again")
_WORDS = (
    (b"reboot: Restarting system", _REBOOTED),
    (b"reboot: Power down", HALTED),
    (b"reboot: System halted", HALTED),
    (b"reboot: Power off not available", HALTED),
    (b"Kernel panic - not syncing", PANICKED),
)
_HALTED = re.compile(rb"reboot: (?:Power off not available: )?System halted(?: instead)?\s*\Z")
_STILL_S = 1.0


def end_told(console: bytes) -> End | None:
    """Return how a guest ended by the last of what its console says, None if it does not."""
    found = [(console.rfind(words), end) for words, end in _WORDS]
    at, end = max(found, key=lambda one: one[0])
    return end if at >= 0 else None


def says_halted(console: bytes) -> bool:
    """Tell whether the last that a guest says is that it has halted.

    A kernel that knows no way to switch its machine off says so and halts its processors instead,
    of which no hypervisor tells: under Firecracker, none knows one.
    """
    return _HALTED.search(console[-200:]) is not None


class Standstill:
    """Tells a guest that may have halted from one that only says so: none of its processors runs.

    An idle one may not run for seconds either, so its agent is to be asked then.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, bytes]] = []
        self._since = 0.0

    def is_found(self, pid: int, processors: Iterable[int]) -> bool:
        """Tell whether none of these threads of a process has run for a second or more.

        That takes at least two looks, so far apart.
        """
        seen = [(thread, _sleep_of(pid, thread)) for thread in processors]
        now = time.monotonic()
        if seen != self._seen or not all(sleep for _, sleep in seen):
            self._seen, self._since = seen, now
        return bool(seen) and now - self._since >= _STILL_S


def _sleep_of(pid: int, thread: int) -> bytes:
    """Return what tells one sleep of a thread from its others; nothing if it is awake."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/task/{thread}/status").read_bytes().splitlines()
        if any(line.startswith(b"State:\tS") for line in lines):
            return b" ".join(line for line in lines if b"_ctxt_switches:" in line)
    return b""
