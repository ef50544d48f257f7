"""How a guest ended, by its kernel's last console output: hypervisors only report that it ended.

A guest may print anything; what is read here affects only itself.
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


def end_of_guest(console: bytes) -> End | None:
    """Return how a guest ended by the end of its console output, or None."""
    found = [(console.rfind(words), end) for words, end in _WORDS]
    at, end = max(found, key=lambda one: one[0])
    return end if at >= 0 else None


def says_halted(console: bytes) -> bool:
    """Tell whether the console output ends with a message that the guest has halted.

    A kernel that cannot power its machine off halts its CPUs instead, which no hypervisor reports.
    Under Firecracker no kernel can.
    """
    return _HALTED.search(console[-200:]) is not None


class Standstill:
    """Distinguishes a guest that has halted from one that only says so: none of its CPUs runs.

    An idle guest may not run for seconds either, so its agent must be asked then.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, bytes]] = []
        self._since = 0.0

    def is_found(self, pid: int, processors: Iterable[int]) -> bool:
        """Tell whether none of these threads of a process has run for a second or more.

        That takes at least two calls a second apart.
        """
        seen = [(thread, _sleep_of(pid, thread)) for thread in processors]
        now = time.monotonic()
        if seen != self._seen or not all(sleep for _, sleep in seen):
            self._seen, self._since = seen, now
        return bool(seen) and now - self._since >= _STILL_S


def _sleep_of(pid: int, thread: int) -> bytes:
    """Return a value that identifies the current sleep of a thread; nothing if it is awake."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/task/{thread}/status").read_bytes().splitlines()
        if any(line.startswith(b"State:\tS") for line in lines):
            return b" ".join(line for line in lines if b"_ctxt_switches:" in line)
    return b""
