"""How long to wait in this machine: limits are written for a machine of usual speed, and the host
says how many times slower this one is."""

_SLOWEST = 100.0
_pace = 1.0


def go_by(pace: float | None) -> None:
    """Adopt the host's factor; None if it did not send one."""
    global _pace  # of the machine, whose speed is the same for all that runs in it
    _pace = min(max(pace or 1.0, 1.0), _SLOWEST)


def patient(seconds: float) -> float:
    """Return how long to wait, in this machine, for what takes less than `seconds` elsewhere."""
    return seconds * _pace
