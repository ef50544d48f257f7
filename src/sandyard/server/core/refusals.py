"""Translates an agent's refusals into typed errors."""

from sandyard.server.core.errors import (
    AlreadyExistsError,
    ChangedError,
    ConflictError,
    GuestNotFoundError,
    InvalidArgumentError,
    KeyReusedError,
    PermissionDeniedError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.wire import Refusal

REASONS = frozenset(Refusal) - {
    Refusal.UNAUTHORIZED, Refusal.UNSUPPORTED, Refusal.BAD_REQUEST, Refusal.REUSED,
}  # fmt: skip
"""Those whose name is sent to the caller."""
REUSED = (
    "cannot use {field}: it was used with another request within the last 24 hours; use a new key "
    "for a new request"
)
_FIELDS = {Refusal.NO_USER: "user", Refusal.NO_FOLDER: "cwd", Refusal.NO_START: "command"}
_SAID_NOTHING = {
    Refusal.ABSENT: "there is no such thing in the sandbox",
    Refusal.EXISTS: "it exists",
    Refusal.DENIED: "it is denied",
    Refusal.NO_SPACE: "the disk is full",
    Refusal.CONFLICT: "it is not in the state for that",
    Refusal.CHANGED: "it has changed",
    Refusal.NO_PROCESS: "there is no such process",
    Refusal.NO_USER: "there is no such user in the sandbox",
    Refusal.NO_FOLDER: "it cannot begin in that directory",
    Refusal.NO_START: "it cannot be started",
    Refusal.BUSY: "the sandbox is busy; nothing was done, try again",
}


def meaning_of(reason: str, message: str) -> SandyardError:
    """Return the error that a refusal is to a caller; `facts` have the `reason` where it has a
    name, and the message is the agent's own where it gave one."""
    if reason == Refusal.REUSED.value:
        return KeyReusedError(REUSED, field="idempotency_key")
    known = next((one for one in REASONS if one.value == reason), None)
    if known is None:
        return InvalidArgumentError(message or "the agent refused")
    message = message or _SAID_NOTHING.get(known, "it is not what it was taken for")
    match known:
        case Refusal.ABSENT:
            return GuestNotFoundError(message, reason=known.value)
        case Refusal.EXISTS:
            return AlreadyExistsError(message, reason=known.value)
        case Refusal.DENIED:
            return PermissionDeniedError(message, reason=known.value)
        case Refusal.NO_SPACE | Refusal.CONFLICT:
            return ConflictError(message, reason=known.value)
        case Refusal.CHANGED:
            return ChangedError(message, reason=known.value)
        case Refusal.NO_PROCESS:
            return GuestNotFoundError(message, reason=known.value)
        case Refusal.NO_USER | Refusal.NO_FOLDER | Refusal.NO_START:
            return InvalidArgumentError(message, field=_FIELDS[known], reason=known.value)
        case Refusal.BUSY:
            return UnavailableError(message, reason=known.value)
        case _:
            return InvalidArgumentError(message, field="path", reason=known.value)
