"""Every operation that the host can ask of the agent: what it is given, and what it answers.

To add one: a class here with its `op` and its `answer`, its work under `guest/ops`, and whoever
asks for it. Both ends, and the fake, read and write what is written here by `core.codec`; an
operation that nobody knows is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.wire import Request

AnswerT = TypeVar("AnswerT")


class Op(StrEnum):
    """The operations by name."""

    HELLO = "hello"
    SETUP = "setup"
    WAKE = "wake"
    EXEC = "exec"
    DIAL = "dial"
    STATS = "stats"


class UnknownOperationError(CodecError):
    """The other side asks for something that this one has never heard of."""


class Operation(Generic[AnswerT]):
    """Base of all. `is_use` says that while one is under way, the sandbox is in use."""

    op: ClassVar[Op]
    answer: ClassVar[type[Any]]
    is_use: ClassVar[bool] = False


@dataclass(frozen=True)
class Done:
    """It is done, and there is nothing more to say."""


@dataclass(frozen=True)
class Greeting:
    """The agent is there."""

    pid: int


@dataclass(frozen=True)
class Hello(Operation[Greeting]):
    """Ask whether the agent is there."""

    op = Op.HELLO
    answer = Greeting


@dataclass(frozen=True)
class Wake(Operation[Done]):
    """Mend what a machine that stood still has wrong: its randomness, its clock, its connections.

    `wall_ns` are nanoseconds since the epoch. Connections to elsewhere are broken off, for their
    other ends are gone, unless the machine `keeps_connections`.
    """

    op = Op.WAKE
    answer = Done

    entropy: bytes = field(repr=False)
    wall_ns: int
    keeps_connections: bool = False


@dataclass(frozen=True)
class SetUp(Operation[Done]):
    """Say who the machine is; with `entropy` and `wall_ns` it is woken first, as by `Wake`.

    `machine_id` makes it another machine than the one it was cloned from, `disk_bytes` have its
    file system fill a disk that has grown. `token` is what the agent accepts from now on.
    `authorized_keys` are lines; without them, or without `password_hash`, what opens the machine
    stays as it is, unless what is there is somebody else's, which this then `replaces_access` of.
    """

    op = Op.SETUP
    answer = Done

    hostname: str
    env: Mapping[str, str] = field(repr=False)
    token: str = field(repr=False)
    authorized_keys: str = ""
    password_hash: str | None = field(default=None, repr=False)
    entropy: bytes | None = field(default=None, repr=False)
    wall_ns: int | None = None
    keeps_connections: bool = False
    machine_id: str | None = None
    disk_bytes: int | None = None
    replaces_access: bool = False

    @property
    def waking(self) -> Wake | None:
        """What is to be mended first, if anything."""
        if self.entropy is None or self.wall_ns is None:
            return None
        return Wake(self.entropy, self.wall_ns, self.keeps_connections)


@dataclass(frozen=True)
class Started:
    """A command runs; frames with what it says follow, the last one an `Ended`."""

    pid: int


@dataclass(frozen=True)
class Execute(Operation[Started]):
    """Run a command line by the shell. With `stdin`, frames of it follow, an empty one its end.

    `timeout_ms` counts from the start of the command, which is then ended with all it started.
    """

    op = Op.EXEC
    answer = Started
    is_use = True

    command: str
    timeout_ms: int
    cwd: str = "/"
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: str = "root"
    stdin: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and the signal's name if one ended it."""

    exit_code: int
    duration_ms: int
    timed_out: bool = False
    signal: str | None = None


@dataclass(frozen=True)
class Dial(Operation[Done]):
    """Connect to a port that something in the machine listens on; raw bytes follow, both ways."""

    op = Op.DIAL
    answer = Done
    is_use = True

    port: int


@dataclass(frozen=True)
class Figures:
    """What the machine takes now: 100 % is one whole CPU, `uptime` is in seconds.

    For a window only `recent_cpu_percent` is told, which costs less.
    """

    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    disk_used_bytes: int | None = None
    disk_total_bytes: int | None = None
    uptime: float | None = None
    recent_cpu_percent: float | None = None


@dataclass(frozen=True)
class Stats(Operation[Figures]):
    """Ask what the machine takes; with `window_s`, how busy users' programs kept it so long."""

    op = Op.STATS
    answer = Figures

    window_s: float | None = None


AnyOperation = Hello | Wake | SetUp | Execute | Dial | Stats
"""Every operation that there is."""

_BY_OP: Mapping[str, type[AnyOperation]] = {
    kind.op.value: kind for kind in (Hello, Wake, SetUp, Execute, Dial, Stats)
}


def request_of(operation: Operation[Any], token: str) -> Request:
    """Return the request that asks an agent for an operation."""
    return Request(operation.op.value, token, encode(operation))


def operation_of(op: str, args: Mapping[str, object]) -> AnyOperation:
    """Return the operation that is asked for.

    Raises:
        UnknownOperationError: there is no such operation.
        CodecError: its arguments are not as agreed.
    """
    kind = _BY_OP.get(op)
    if kind is None:
        raise UnknownOperationError(f"there is no operation {op[:40]!r}")
    operation: AnyOperation = decode(kind, args)
    return operation


def answer_of(operation: Operation[AnswerT], values: Mapping[str, object]) -> AnswerT:
    """Return what an agent answered.

    Raises:
        CodecError: the answer is not as agreed.
    """
    answer: AnswerT = decode(operation.answer, values)
    return answer
