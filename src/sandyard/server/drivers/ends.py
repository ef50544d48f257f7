"""How a guest came to its end, as its kernel says it last: hypervisors tell only that it has.

A guest may print what it likes; what it says here concerns nobody but itself.
"""

from sandyard.server.core.contracts.node import POWERED_OFF, REBOOTED
from sandyard.server.drivers.contract import End

TAIL = 64 * 1024
PANICKED = End("guest_panicked", "the guest's kernel panicked; see the sandbox's log")
_REBOOTED = End(REBOOTED, "the guest was rebooted from inside")
_POWERED_OFF = End(POWERED_OFF, "the guest was powered off from inside; resume boots it again")
_WORDS = (
    (b"reboot: Restarting system", _REBOOTED),
    (b"reboot: Power down", _POWERED_OFF),
    (b"reboot: System halted", _POWERED_OFF),
    (b"Kernel panic - not syncing", PANICKED),
)


def end_told(console: bytes) -> End | None:
    """Return how a guest ended by the last of what its console says, None if it does not."""
    found = [(console.rfind(words), end) for words, end in _WORDS]
    at, end = max(found, key=lambda one: one[0])
    return end if at >= 0 else None
