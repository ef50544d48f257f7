"""The typed errors that Sandyard raises, in one tree.

SandyardError
├── InvalidArgumentError        the request is invalid; correct it
│   └── KeyReusedError          an idempotency key came with another request
├── UnauthenticatedError        no credential
│   ├── InvalidTokenError       the credential is unknown, revoked or malformed
│   └── TokenExpiredError       the credential has expired
├── PermissionDeniedError       a scope or role is missing
├── NotFoundError               absent, or another organization's
│   └── GuestNotFoundError      nothing of that name inside the sandbox
├── AlreadyExistsError          the name or thing is taken
├── WorkspaceInUseError         a sandbox has the workspace mounted
├── LimitReachedError           the organization has as much as its plan allows
├── ConflictError               the present status does not allow it
│   ├── OvertakenError          a later request for the same sandbox came first
│   ├── MachineDeadError        the sandbox's machine has ended
│   ├── ChangedError            it is not as the caller believed
│   └── NotReadyError           what a template starts did not become ready
├── QuotaExceededError          credits do not suffice
├── PayloadTooLargeError        a stated size limit is passed
├── RateLimitedError            too many requests; wait
├── AgentError                  the agent in a sandbox violates its protocol
├── DamagedError                a saved state cannot be used
│   └── IncompatibleError       it is intact, and needs another host or hypervisor
├── UnsupportedError            this driver or host cannot do it
│   └── OtherVersionError       the peer is of a version that does not know the request
├── NotImplementedYetError      planned, and not in this version
├── UnavailableError            not now; try again
│   ├── NoCapacityError         the host is full now
│   ├── DeadlineExceededError   a wait reached its limit
│   └── AgentSilentError        the machine runs and its agent does not answer
└── InternalError               a bug or a broken invariant

Each class has a code for programs, and each error a sentence for people. Only faces know which HTTP
status belongs to a code.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

_NAMED = ("field", "limit")
"""Facts that are names of fields."""


class Code(StrEnum):
    """What went wrong, for programs; the values are those of the HTTP contract."""

    BAD_REQUEST = "bad_request"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    UNAUTHORIZED = "unauthorized"
    INVALID_TOKEN = "invalid_token"
    TOKEN_EXPIRED = "token_expired"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    WORKSPACE_IN_USE = "WORKSPACE_IN_USE"
    PRECONDITION_FAILED = "precondition_failed"
    LIMIT_REACHED = "limit_reached"
    INVALID_STATE = "invalid_state"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    RATE_LIMITED = "rate_limited"
    DAMAGED = "damaged"
    INCOMPATIBLE = "incompatible"
    UNSUPPORTED = "unsupported"
    NOT_IMPLEMENTED = "not_implemented"
    UNAVAILABLE = "unavailable"
    NO_CAPACITY = "no_capacity"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    AGENT_ERROR = "agent_error"
    INTERNAL_ERROR = "internal_error"


class SandyardError(Exception):
    """Base of all intended errors; anything else that escapes a room is a bug.

    `facts` are small values a program may want (the field, the status), never secrets. In `text`
    the placeholders `{field}` and `{limit}` stand for the facts of that name: the domain's name of
    a field, which each face replaces by its own.
    """

    code: ClassVar[Code]
    retryable: ClassVar[bool] = False

    def __init__(self, text: str, **facts: str | int) -> None:
        self.text = text
        self.facts = facts
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The sentence for people, with the domain's names of fields."""
        return self.message_with(str)

    def message_with(self, name: Callable[[str], str]) -> str:
        """Return the sentence for people; `name` turns a field of the domain into a face's."""
        found = self.text
        for fact in _NAMED:
            if isinstance(value := self.facts.get(fact), str):
                found = found.replace(f"{{{fact}}}", name(value))
        return found


class InvalidArgumentError(SandyardError):
    """The request is invalid; the caller has to change it."""

    code = Code.BAD_REQUEST


class KeyReusedError(InvalidArgumentError):
    """The idempotency key was used before, with a different request."""

    code = Code.IDEMPOTENCY_KEY_REUSED


class UnauthenticatedError(SandyardError):
    """The request has no credential."""

    code = Code.UNAUTHORIZED


class InvalidTokenError(UnauthenticatedError):
    """The credential is unknown, revoked or malformed."""

    code = Code.INVALID_TOKEN


class TokenExpiredError(UnauthenticatedError):
    """The credential has expired."""

    code = Code.TOKEN_EXPIRED


class PermissionDeniedError(SandyardError):
    """The credential lacks a scope or a role."""

    code = Code.FORBIDDEN


class NotFoundError(SandyardError):
    """The resource does not exist, or belongs to another organization. The answer does not say
    which."""

    code = Code.NOT_FOUND


class GuestNotFoundError(NotFoundError):
    """There is no such file, process or listener inside the sandbox."""


class AlreadyExistsError(SandyardError):
    """A name or resource that must be unique exists already."""

    code = Code.CONFLICT


class WorkspaceInUseError(SandyardError):
    """A sandbox has the workspace mounted. The caller may force the request."""

    code = Code.WORKSPACE_IN_USE


class LimitReachedError(SandyardError):
    """The organization has reached a limit of its plan."""

    code = Code.LIMIT_REACHED


class ConflictError(SandyardError):
    """The current status does not allow the request, or a concurrent request came first."""

    code = Code.INVALID_STATE


class OvertakenError(ConflictError):
    """A later request for the same sandbox came first; this one changes nothing."""


class MachineDeadError(ConflictError):
    """The sandbox's machine has ended."""

    def __init__(self, text: str, **facts: str | int) -> None:
        super().__init__(text, **{"status": "error", **facts})


class ChangedError(ConflictError):
    """A condition of the request does not hold: the resource has changed, or exists already."""

    code = Code.PRECONDITION_FAILED


class NotReadyError(ConflictError):
    """A template's command `ready` did not succeed in time."""


class QuotaExceededError(SandyardError):
    """The organization's credits do not suffice."""

    code = Code.INSUFFICIENT_CREDITS


class PayloadTooLargeError(SandyardError):
    """The request exceeds a size limit."""

    code = Code.PAYLOAD_TOO_LARGE

    def __init__(self, text: str, **facts: str | int) -> None:
        super().__init__(text, **{"reason": "too_large", **facts})


class RateLimitedError(SandyardError):
    """Too many requests. `retry_after_s` says how long to wait."""

    code = Code.RATE_LIMITED
    retryable = True

    def __init__(self, text: str, *, retry_after_s: int, **facts: str | int) -> None:
        super().__init__(text, **facts)
        self.retry_after_s = retry_after_s


class AgentError(SandyardError):
    """The agent in the sandbox violated its protocol.

    A process that runs as root in a guest can make the agent send anything, so this is a fault of
    the sandbox, not of the server.
    """

    code = Code.AGENT_ERROR

    def __init__(self, text: str = "", **facts: str | int) -> None:
        super().__init__(
            text
            or "cannot understand the agent of the sandbox: it was changed, or is damaged; restart "
            "the sandbox, or make a new one",
            **facts,
        )


class DamagedError(SandyardError):
    """A saved state cannot be used."""

    code = Code.DAMAGED


class IncompatibleError(DamagedError):
    """A saved state is intact, and needs another hypervisor or processor. Nothing was changed."""

    code = Code.INCOMPATIBLE


class UnsupportedError(SandyardError):
    """This driver, template or host does not support the request."""

    code = Code.UNSUPPORTED


class OtherVersionError(UnsupportedError):
    """The peer is of a version that does not know the request; another peer may, or this one once
    it is updated."""


class NotImplementedYetError(SandyardError):
    """The route is planned and not implemented in this version."""

    code = Code.NOT_IMPLEMENTED


class UnavailableError(SandyardError):
    """The request is valid and cannot be served now."""

    code = Code.UNAVAILABLE
    retryable = True


class NoCapacityError(UnavailableError):
    """The host has no capacity for another machine now."""

    code = Code.NO_CAPACITY


class DeadlineExceededError(UnavailableError):
    """A wait reached its limit. The work may still complete."""

    code = Code.DEADLINE_EXCEEDED


class AgentSilentError(UnavailableError):
    """The machine was resumed from its saved state and its agent does not answer. Its memory is
    kept."""


class InternalError(SandyardError):
    """A bug or a broken invariant. The server's log has the details."""

    code = Code.INTERNAL_ERROR


_BY_CODE: Mapping[Code, type[SandyardError]] = MappingProxyType(
    {
        kind.code: kind
        for kind in (
            InvalidArgumentError, KeyReusedError, UnauthenticatedError, InvalidTokenError,
            TokenExpiredError, PermissionDeniedError, NotFoundError, AlreadyExistsError,
            WorkspaceInUseError, LimitReachedError, ConflictError, ChangedError, QuotaExceededError,
            PayloadTooLargeError, AgentError,
            DamagedError, IncompatibleError, UnsupportedError, NotImplementedYetError,
            UnavailableError, NoCapacityError, DeadlineExceededError, InternalError,
        )
    }
)  # fmt: skip


_BY_KIND: Mapping[str, type[SandyardError]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (*_BY_CODE.values(), GuestNotFoundError, OvertakenError, MachineDeadError,
                     AgentSilentError, OtherVersionError, NotReadyError)
    }
)  # fmt: skip


def kind_of(error: SandyardError) -> str:
    """Return the name under which another process rebuilds an error with `error_of`."""
    return type(error).__name__


def error_of(kind: str, code: str, text: str, facts: Mapping[str, str | int]) -> SandyardError:
    """Return the error that another process reported.

    `kind` is its `kind_of`. An unknown kind, of another version, is taken by its `code`, and an
    unknown code is an InternalError.
    """
    known = _BY_KIND.get(kind) or (_BY_CODE.get(Code(code)) if code in list(Code) else None)
    known_facts = {name: value for name, value in facts.items() if name not in ("self", "text")}
    return (known or InternalError)(text, **known_facts)
