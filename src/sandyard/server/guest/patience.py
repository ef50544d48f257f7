"""How long this machine is waited for: what bounds a wait is written for a machine of usual speed,
and the host says how many times longer everything takes here."""

_SLOWEST = 100.0
_pace = 1.0


def go_by(pace: float | None) -> None:
    """Take what the host measured; None is a host that says nothing of it."""
    global _pace  # of the machine, whose speed is the same for all that runs in it
    _pace = min(max(pace or 1.0, 1.0), _SLOWEST)


def patient(seconds: float) -> float:
    """Return how long to wait here for what takes less than `seconds` elsewhere."""
    return seconds * _pace
