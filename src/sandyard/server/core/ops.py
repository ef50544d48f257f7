"""Every operation that the host can ask of the agent: what it is given, and what it answers.

To add one: a class here with its `op` and its `answer`, its work under `guest/ops`, and whoever
asks for it. Both ends, and the fake, read and write what is written here by `core.codec`; an
operation that nobody knows is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar, get_args

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.wire import Request

AnswerT = TypeVar("AnswerT")


class Op(StrEnum):
    """The operations by name."""

    HELLO = "hello"
    SETUP = "setup"
    WAKE = "wake"
    MOUNT = "mount"
    UNMOUNT = "unmount"
    EXEC = "exec"
    START = "start"
    RUN = "run"
    PIPE = "pipe"
    ATTACH = "attach"
    LIST = "list"
    SIGNAL = "signal"
    INPUT = "input"
    RESIZE = "resize"
    STAT = "stat"
    LIST_FOLDER = "list_folder"
    MAKE_FOLDER = "make_folder"
    MOVE = "move"
    COPY = "copy"
    REMOVE = "remove"
    READ = "read"
    WRITE = "write"
    WATCH_FOLDER = "watch_folder"
    DIAL = "dial"
    LISTEN = "listen"
    TAKE = "take"
    STATS = "stats"


class UnknownOperationError(CodecError):
    """The other side asks for something that this one has never heard of."""


class Operation(Generic[AnswerT]):
    """Base of all. `is_use` says that while one is under way, the sandbox is in use; one that is
    `used_by_bytes` is a use whenever bytes go through it, and none while it is silent. Of one that
    is `asked_by_users` a refusal is for them, and may say why."""

    op: ClassVar[Op]
    answer: ClassVar[type[Any]]
    is_use: ClassVar[bool] = False
    used_by_bytes: ClassVar[bool] = False
    asked_by_users: ClassVar[bool] = False


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
    `pace` is how many times longer than usual things take in the machine, if they do.
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
    pace: float | None = None

    @property
    def waking(self) -> Wake | None:
        """What is to be mended first, if anything."""
        if self.entropy is None or self.wall_ns is None:
            return None
        return Wake(self.entropy, self.wall_ns, self.keeps_connections)


@dataclass(frozen=True)
class MountPoint:
    """A workspace, by the name it is exported under, and the path that it is to be at."""

    name: str
    path: str
    read_only: bool = False


CLOSED_PORT = 9
"""A port of the gateway's at which nobody ever serves workspaces."""


@dataclass(frozen=True)
class MountAll(Operation[Done]):
    """Mount workspaces, in this order, from the gateway's `port`; folders are made for them.

    `client` is how the machine is told apart from every other that mounts from there: it must be
    its own, for a machine that uses another's is taken for that one. Attributes of files are cached
    for `attribute_cache_s`; agents that do not know this field cache nothing.
    """

    op = Op.MOUNT
    answer = Done

    port: int
    client: str = field(repr=False)
    mounts: Sequence[MountPoint] = ()
    attribute_cache_s: int = 0


@dataclass(frozen=True)
class Unmount(Operation[Done]):
    """Take a workspace away from where it is mounted; what has files of it open gets errors."""

    op = Op.UNMOUNT
    answer = Done

    path: str


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
class Size:
    """How large a terminal is, in characters."""

    columns: int
    rows: int


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and the signal's name if one ended it."""

    exit_code: int
    duration_ms: int
    timed_out: bool = False
    signal: str | None = None


@dataclass(frozen=True)
class Program:
    """A process: of those of `Execute` the ones that run, of those of `Start` ended ones, too.

    Times are milliseconds since the epoch. `printed` counts its output, in bytes.
    """

    pid: int
    command: str
    cwd: str
    user: str
    started_ms: int
    printed: int
    tag: str | None = None
    takes_input: bool = False
    terminal: Size | None = None
    ended_ms: int | None = None
    end: Ended | None = None


@dataclass(frozen=True)
class Start(Operation[Program]):
    """Start a process that lives on when this connection has ended.

    Either a `command` line, run by the shell, or the words of `argv`, the first of which is looked
    for in PATH. A `login` is of the user's own shell, which without either of them is what is
    started. The folder `~` is the user's home. With `stdin` it has an input that `Input` writes to,
    else nothing to read; with a `terminal` both, and its output comes as one. Until somebody
    attaches for the first time, at most ten seconds, it is held back rather than that any of its
    output is lost. Once nobody has followed it for `hang_up_s`, it is hung up on, as by a modem.
    """

    op = Op.START
    asked_by_users = True
    answer = Program

    command: str | None = None
    argv: Sequence[str] = ()
    cwd: str = "/"
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: str = "root"
    tag: str | None = None
    stdin: bool = False
    terminal: Size | None = None
    timeout_ms: int | None = None
    login: bool = False
    hang_up_s: float | None = None


@dataclass(frozen=True)
class Run(Start):
    """`Start` and `Attach` in one: frames follow the answer. Its end is not kept.

    A `line` takes the place of the command: bytes as the shell gets them, which need not be text.
    """

    op = Op.RUN
    used_by_bytes = True

    line: bytes | None = None


@dataclass(frozen=True)
class Pipe(Operation[Done]):
    """Run a command line by the user's shell, with the connection itself as its input and output:
    raw bytes follow, both ways, which nobody in the machine but the program handles. Its end ends
    the connection, and the other way round; how it ended, and what it says on standard error, is
    not told."""

    op = Op.PIPE
    answer = Done
    used_by_bytes = True

    command: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: str = "root"


@dataclass(frozen=True)
class Attached:
    """Somebody is attached, and frames follow: what the process prints from the byte `offset` on,
    counted over all that it ever printed, and an `Ended` at last. `lost` bytes, from what was
    asked for up to there, are kept no more."""

    pid: int
    offset: int
    lost: int = 0


@dataclass(frozen=True)
class Attach(Operation[Attached]):
    """Follow what a process prints, from a byte on or, without `offset`, from now.

    Any number may; the process waits for the slowest. What the host sends in frames goes to its
    input, an empty frame ends that. A process that has ended tells what is kept, and its end.
    """

    op = Op.ATTACH
    asked_by_users = True
    answer = Attached
    is_use = True

    pid: int | None = None
    tag: str | None = None
    offset: int | None = None


@dataclass(frozen=True)
class AttachLive(Attach):
    """`Attach`, by somebody at a terminal: it is a use while something is typed or printed."""

    is_use = False
    used_by_bytes = True


@dataclass(frozen=True)
class Programs:
    """Processes, oldest first; `is_cut` if there are more than one answer can hold."""

    items: Sequence[Program]
    is_cut: bool = False


@dataclass(frozen=True)
class List(Operation[Programs]):
    """Ask for the processes, or for one of them."""

    op = Op.LIST
    asked_by_users = True
    answer = Programs

    pid: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Signal(Operation[Started]):
    """Send a signal to a process, or to `everything` that it started and that still lives; the
    answer tells its pid."""

    op = Op.SIGNAL
    asked_by_users = True
    answer = Started

    number: int
    pid: int | None = None
    tag: str | None = None
    everything: bool = False


@dataclass(frozen=True)
class Written:
    """So many bytes were taken in time: the process did not read on for the rest; and whether its
    input was closed then, if that was asked for."""

    count: int
    is_closed: bool = False


@dataclass(frozen=True)
class Input(Operation[Written]):
    """Write to the input of a process, and `closes` it when all is written."""

    op = Op.INPUT
    asked_by_users = True
    answer = Written
    is_use = True

    data: bytes = field(default=b"", repr=False)
    closes: bool = False
    pid: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Resize(Operation[Done]):
    """Tell a process that its terminal has another size."""

    op = Op.RESIZE
    asked_by_users = True
    answer = Done

    terminal: Size
    pid: int | None = None
    tag: str | None = None


class FileKind(StrEnum):
    """What a path leads to."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"  # a device, a pipe, a socket


@dataclass(frozen=True)
class FileFact:
    """What a file system tells of a file; a link is told of as such, with its `target`.

    Paths are bytes, as the kernel has them. `mode` are the permission bits, `owner` and `group`
    names where the machine knows any.
    """

    path: bytes
    kind: FileKind
    size: int
    mode: int
    uid: int
    gid: int
    modified_ms: int
    owner: str | None = None
    group: str | None = None
    target: bytes | None = None


@dataclass(frozen=True)
class FileTrouble:
    """Why the rest of an operation on a file came to nothing: one of `core.wire.Refusal`."""

    error: str
    message: str


@dataclass(frozen=True)
class FileEnd:
    """The last frame of an operation on a file: how much of it there was, or what was wrong.

    `count` are bytes, or entries of a list; `is_cut` says that there are more of those. `fact` is
    what came of a move or copy.
    """

    count: int = 0
    is_cut: bool = False
    fact: FileFact | None = None
    trouble: FileTrouble | None = None


@dataclass(frozen=True)
class Stat(Operation[FileFact]):
    """Ask what a path leads to. Like all operations on files it is done as a `user`, in the
    user's own root, and links lead where they lead there."""

    op = Op.STAT
    asked_by_users = True
    answer = FileFact

    path: bytes
    user: str = "root"


@dataclass(frozen=True)
class ListFolder(Operation[Done]):
    """List a folder down to a `depth`, 1 for what is in it: frames with JSON lists of `FileFact`
    follow, at most `limit` in all, and a `FileEnd` at last."""

    op = Op.LIST_FOLDER
    asked_by_users = True
    answer = Done

    path: bytes
    depth: int = 1
    limit: int = 10_000
    user: str = "root"


@dataclass(frozen=True)
class MakeFolder(Operation[FileFact]):
    """Make a folder, and with `parents` those above it; then one that is there is no error."""

    op = Op.MAKE_FOLDER
    asked_by_users = True
    answer = FileFact

    path: bytes
    parents: bool = False
    mode: int | None = None
    owner: str | None = None
    user: str = "root"


@dataclass(frozen=True)
class Move(Operation[Done]):
    """Give a file or folder another path, over a file that is there if it `replaces` it. It has
    begun when it is answered, and is done when a `FileEnd` tells of it."""

    op = Op.MOVE
    asked_by_users = True
    answer = Done
    is_use = True

    source: bytes
    target: bytes
    replaces: bool = False
    user: str = "root"


@dataclass(frozen=True)
class Copy(Operation[Done]):
    """Copy a file, or a folder with all that is in it; links stay links. See `Move`."""

    op = Op.COPY
    asked_by_users = True
    answer = Done
    is_use = True

    source: bytes
    target: bytes
    replaces: bool = False
    user: str = "root"


@dataclass(frozen=True)
class Remove(Operation[Done]):
    """Remove a file or an empty folder, or with `everything` a folder and all that is in it. See
    `Move`."""

    op = Op.REMOVE
    asked_by_users = True
    answer = Done
    is_use = True

    path: bytes
    everything: bool = False
    user: str = "root"


@dataclass(frozen=True)
class Read(Operation[FileFact]):
    """Read a file from `offset`, at most `length` bytes: frames follow, a `FileEnd` at last.

    A file of /proc or /sys has no size that could be relied on: it is told as 0, and the file is
    read until it ends.
    """

    op = Op.READ
    asked_by_users = True
    answer = FileFact
    is_use = True

    path: bytes
    offset: int = 0
    length: int | None = None
    user: str = "root"


@dataclass(frozen=True)
class Write(Operation[Done]):
    """Write a file: frames of it come from the host, an empty one at the end, and a `FileEnd`
    follows. Until then what was there stays whole, unless it is written `in_place`.

    `mode` and `owner` of one that is there are kept if they are not given.
    """

    op = Op.WRITE
    asked_by_users = True
    answer = Done
    is_use = True

    path: bytes
    in_place: bool = False
    parents: bool = False
    mode: int | None = None
    owner: str | None = None
    user: str = "root"


class ChangeKind(StrEnum):
    """What became of a file."""

    CREATED = "created"
    MODIFIED = "modified"
    ATTRIBUTES = "attributes"  # its mode, its owner, its times
    REMOVED = "removed"
    MOVED = "moved"
    OVERFLOW = "overflow"  # more happened than could be told: look anew


@dataclass(frozen=True)
class FileChange:
    """Something changed in a folder that is watched; what `MOVED` came from `source`."""

    path: bytes
    kind: ChangeKind
    is_folder: bool = False
    source: bytes | None = None


@dataclass(frozen=True)
class WatchFolder(Operation[Done]):
    """Watch a folder from the answer on, with `recursive` all that is in it, too: frames with JSON
    lists of `FileChange` follow, and a `FileEnd` once it is there no more.

    To watch is no use of a machine: nobody keeps one awake by that alone.
    """

    op = Op.WATCH_FOLDER
    asked_by_users = True
    answer = Done

    path: bytes
    recursive: bool = False
    user: str = "root"


FileOperation = Stat | ListFolder | MakeFolder | Move | Copy | Remove | Read | Write | WatchFolder
"""What is asked of files."""


@dataclass(frozen=True)
class Dial(Operation[Done]):
    """Connect to a port that something in the machine listens on; raw bytes follow, both ways.

    With a `host`, the machine connects to a port there, as its own programs would; with a `path`,
    to a socket of its file system.
    """

    op = Op.DIAL
    asked_by_users = True
    answer = Done
    used_by_bytes = True

    port: int = 0
    host: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Listening:
    """The machine listens, at a `port` or a `path`, until the connection ends; frames with a JSON
    `Caller` follow for each connection that comes."""

    port: int = 0
    path: str = ""


@dataclass(frozen=True)
class Caller:
    """Somebody connected, from an address, and waits to be taken."""

    number: int
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class Listen(Operation[Listening]):
    """Have the machine listen: on a `host`'s port, any free one for 0; at a `path`, on a socket
    there that is the `user`'s; without either on a socket of a new folder that only the `user` may
    enter.

    A socket that is at the path already is replaced if nobody listens on it.
    """

    op = Op.LISTEN
    asked_by_users = True
    answer = Listening

    host: str | None = None
    port: int = 0
    path: str | None = None
    user: str = "root"


@dataclass(frozen=True)
class Take(Operation[Done]):
    """Take a connection that came to a `Listen`; raw bytes follow, both ways."""

    op = Op.TAKE
    asked_by_users = True
    answer = Done
    used_by_bytes = True

    number: int


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


AnyOperation = (
    Hello
    | Wake
    | MountAll
    | Unmount
    | SetUp
    | Execute
    | Start
    | Run
    | Pipe
    | Attach
    | List
    | Signal
    | Input
    | Resize
    | FileOperation
    | Dial
    | Listen
    | Take
    | Stats
)
"""Every operation that there is."""

_BY_OP: Mapping[str, type[AnyOperation]] = {kind.op.value: kind for kind in get_args(AnyOperation)}


def request_of(operation: Operation[Any], token: str, *, again: bool = False) -> Request:
    """Return the request that asks an agent for an operation; see core.wire for `again`."""
    return Request(operation.op.value, token, encode(operation), again=again)


def may_be_followed(operation: Operation[Any]) -> bool:
    """Tell whether another operation may follow by the same connection once this one is over."""
    match operation:
        case Execute():
            return not operation.stdin  # what came of it late would be taken for the next
        case Run():
            return False
        case Hello() | SetUp() | Wake() | MountAll() | Unmount() | Stats():
            return True
        case Start() | List() | Signal() | Input() | Resize():
            return True
        case _:
            return False


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
