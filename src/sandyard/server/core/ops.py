"""Every operation that the host can request from the agent: its arguments and its answer.

To add one, add a class here with its `op` and its `answer`, its implementation under `guest/ops`,
and the caller. Both ends, and the fake agent, encode and decode with `core.codec`. An unknown
operation is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, Generic, TypeVar, get_args

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.wire import Request

AnswerT = TypeVar("AnswerT")


class Op(StrEnum):
    """The names of the operations: those of agents, and at the end those of `core.copies`."""

    HELLO = "hello"
    SETUP = "setup"
    WAKE = "wake"
    TRUST = "trust"
    MOUNT = "mount"
    UNMOUNT = "unmount"
    FLUSH = "flush"
    EXEC = "exec"
    START = "start"
    RUN = "run"
    PIPE = "pipe"
    ATTACH = "attach"
    LIST = "list"
    SIGNAL = "signal"
    INPUT = "input"
    FEED = "feed"
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
    OPEN_WATCH = "open_watch"
    READ_WATCH = "read_watch"
    CLOSE_WATCH = "close_watch"
    DIAL = "dial"
    LISTEN = "listen"
    TAKE = "take"
    STATS = "stats"
    READ_COPY = "read_copy"
    WRITE_COPY = "write_copy"


DEFAULT: Final = ""
"""In the place of a user or working directory: the template's own. Agents never see it."""


class UnknownOperationError(CodecError):
    """The other side requested an operation that is unknown here."""


class Operation(Generic[AnswerT]):
    """Base of all operations.

    While an operation with `is_use` is in progress, the sandbox is in use. One that is
    `used_by_bytes` is a use while data passes through it, and not while it is silent. If it is
    `asked_by_users`, the message of a refusal is passed on to them.
    """

    op: ClassVar[Op]
    answer: ClassVar[type[Any]]
    is_use: ClassVar[bool] = False
    used_by_bytes: ClassVar[bool] = False
    asked_by_users: ClassVar[bool] = False


@dataclass(frozen=True)
class Done:
    """The operation is done, and returns nothing."""


@dataclass(frozen=True)
class Greeting:
    """The agent is running."""

    pid: int


@dataclass(frozen=True)
class Hello(Operation[Greeting]):
    """Ask whether the agent is running."""

    op = Op.HELLO
    answer = Greeting


@dataclass(frozen=True)
class Wake(Operation[Done]):
    """Renew what is outdated in a machine that was suspended: randomness, clock, connections.

    `wall_ns` is in nanoseconds since the epoch. Connections to other hosts are reset, because their
    peers are gone, unless the machine `keeps_connections`.
    """

    op = Op.WAKE
    answer = Done

    entropy: bytes = field(repr=False)
    wall_ns: int
    keeps_connections: bool = False


@dataclass(frozen=True)
class Trust(Operation[Done]):
    """Have the machine's programs trust an authority: its `certificate` (PEM) is added to the
    image's stores and to /etc/environment. `name_hash` is what OpenSSL finds it by (x509(1),
    -subject_hash)."""

    op = Op.TRUST
    answer = Done

    certificate: str
    name_hash: str


@dataclass(frozen=True)
class SetUp(Operation[Done]):
    """Give the machine its identity. With `entropy` and `wall_ns` it is woken first, as by `Wake`.

    `machine_id` distinguishes it from the machine it was cloned from. With `disk_bytes` its file
    system is grown to the size of its disk. `token` is the one that the agent accepts from now on.
    `authorized_keys` are lines. If they or `password_hash` are missing, the existing ones are kept,
    unless they belong to another sandbox: `replaces_access` removes them. `pace` is how many times
    slower than usual the machine is. `trust` is done, too.
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
    trust: Trust | None = None

    @property
    def waking(self) -> Wake | None:
        """The `Wake` that is done first, if any."""
        if self.entropy is None or self.wall_ns is None:
            return None
        return Wake(self.entropy, self.wall_ns, self.keeps_connections)


@dataclass(frozen=True)
class MountPoint:
    """A workspace, by the name of its export, and the path to mount it at."""

    name: str
    path: str
    read_only: bool = False


CLOSED_PORT = 9
"""A port of the gateway at which no workspaces are ever served."""


@dataclass(frozen=True)
class MountAll(Operation[Done]):
    """Mount workspaces, in this order, from the gateway's `port`; missing directories are created.

    `client` identifies the machine to the file server. It must be unique, because machines with the
    same identity are treated as one. Attributes of files are cached for `attribute_cache_s`; agents
    that do not know this field cache nothing.
    """

    op = Op.MOUNT
    answer = Done

    port: int
    client: str = field(repr=False)
    mounts: Sequence[MountPoint] = ()
    attribute_cache_s: int = 0


@dataclass(frozen=True)
class Unmount(Operation[Done]):
    """Unmount a workspace; programs that have its files open get errors."""

    op = Op.UNMOUNT
    answer = Done

    path: str


@dataclass(frozen=True)
class Flush(Operation[Done]):
    """Write what programs have written to files to the machine's disks (sync(2))."""

    op = Op.FLUSH
    answer = Done


@dataclass(frozen=True)
class Started:
    """A command runs. Frames with its output follow; the last one is an `Ended`."""

    pid: int


@dataclass(frozen=True)
class Execute(Operation[Started]):
    """Run a command line with the shell. With `stdin`, frames of it follow; an empty one is its
    end.

    `timeout_ms` counts from the start of the command. At the limit, and if the host disconnects, it
    is ended with all processes that it started.
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
    """The size of a terminal, in characters."""

    columns: int
    rows: int


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and the name of the signal that ended it, if any."""

    exit_code: int
    duration_ms: int
    timed_out: bool = False
    signal: str | None = None


@dataclass(frozen=True)
class Program:
    """A process. Those of `Execute` are listed while they run; those of `Start` also after their
    end.

    Times are in milliseconds since the epoch. `printed` is the size of its output so far, and `fed`
    of the input that it has taken, in bytes.
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
    fed: int = 0


@dataclass(frozen=True)
class Start(Operation[Program]):
    """Start a process that continues when this connection has ended.

    It is either a `command` line, run by the shell, or the words of `argv`, the first of which is
    looked up in PATH. With `login` the user's login shell runs it, or is started itself if there is
    neither. A `cwd` of `~` is the user's home, and one of `~/…` is below it. With `stdin` it has an
    input, which `Input` writes to; otherwise its input is empty. With a `terminal` it has an input,
    too, and one output. Until the first client attaches, at most for ten seconds, it is blocked
    rather than losing output. If no client has followed it for `hang_up_s`, it gets a hangup. An
    equal start with the same `key` within a day starts nothing, and is answered with the process of
    the first.

    With `replaces` it takes the `tag` of the process with that pid. It is refused if that is not
    the last with the tag any more.
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
    key: str | None = None
    replaces: int | None = None


@dataclass(frozen=True)
class Run(Start):
    """`Start` and `Attach` in one: frames follow the answer. Its end is not kept unless it
    `keeps_end`.

    A `line` takes the place of the command: bytes for the shell, which need not be UTF-8.
    """

    op = Op.RUN
    used_by_bytes = True

    line: bytes | None = None
    keeps_end: bool = False


@dataclass(frozen=True)
class Pipe(Operation[Done]):
    """Run a command line with the user's shell and the connection itself as its input and output:
    raw bytes follow in both directions, and only the program reads and writes them. The end of
    either ends the other. Exit code and standard error are lost."""

    op = Op.PIPE
    answer = Done
    used_by_bytes = True

    command: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: str = "root"


@dataclass(frozen=True)
class Attached:
    """The client is attached. Frames follow: the output from byte `offset`, counted from the start
    of the process, and an `Ended` at the end. `lost` bytes before `offset` were requested and are
    no longer kept."""

    pid: int
    offset: int
    lost: int = 0


@dataclass(frozen=True)
class Attach(Operation[Attached]):
    """Follow the output of a process, from a byte on or, without `offset`, from now.

    Several clients may; the process waits for the slowest. Frames from the host go to its input,
    and an empty frame closes that. For a process that has ended, the kept output and its end are
    sent.
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
    """`Attach`, by a person at a terminal: it is a use while something is typed or printed."""

    is_use = False
    used_by_bytes = True


@dataclass(frozen=True)
class Programs:
    """Processes, oldest first; `is_cut` if there are more than fit into one answer."""

    items: Sequence[Program]
    is_cut: bool = False


@dataclass(frozen=True)
class List(Operation[Programs]):
    """List the processes, or one of them."""

    op = Op.LIST
    asked_by_users = True
    answer = Programs

    pid: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Signal(Operation[Started]):
    """Send a signal to a process, or with `everything` to all running processes that it started.
    With `forgets_tag`, its tag is removed first, even if it has ended. The answer has its pid."""

    op = Op.SIGNAL
    asked_by_users = True
    answer = Started

    number: int
    pid: int | None = None
    tag: str | None = None
    everything: bool = False
    forgets_tag: bool = False


@dataclass(frozen=True)
class Written:
    """The number of bytes that the process's input took within the limit, and whether it was closed
    then, if that was requested."""

    count: int
    is_closed: bool = False


@dataclass(frozen=True)
class Input(Operation[Written]):
    """Write to the input of a process; with `closes`, close it after that."""

    op = Op.INPUT
    asked_by_users = True
    answer = Written
    is_use = True

    data: bytes = field(default=b"", repr=False)
    closes: bool = False
    pid: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Fed:
    """How many bytes the input of a process has taken since its start."""

    taken: int


@dataclass(frozen=True)
class FeedEnd:
    """How many bytes of a stream the input of a process has taken, and whether it was closed, if
    that was requested. `trouble` says why it takes no more."""

    count: int
    is_closed: bool = False
    trouble: str | None = None


@dataclass(frozen=True)
class Feed(Operation[Fed]):
    """Write a stream to the input of a process: frames of it follow, and an empty one ends it,
    after which the input is closed if it `closes`. The last frame from the agent is a FeedEnd.

    With an `offset` the stream begins there in the input, and what the input has taken before is
    not written again, so that streams of the same bytes may follow or overlap each other.

    If the process takes nothing for some seconds, the rest of the stream is discarded.
    """

    op = Op.FEED
    asked_by_users = True
    answer = Fed
    is_use = True

    closes: bool = False
    pid: int | None = None
    tag: str | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Resize(Operation[Done]):
    """Change the size of a process's terminal."""

    op = Op.RESIZE
    asked_by_users = True
    answer = Done

    terminal: Size
    pid: int | None = None
    tag: str | None = None


class FileKind(StrEnum):
    """The kind of a file."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"  # a device, a pipe, a socket


LABEL: Final = "user.e2b."
"""How the names of extended attributes (xattr(7)) begin that clients of files set and see."""


@dataclass(frozen=True)
class FileFact:
    """The metadata of a file; links are not followed, and have a `target`.

    Paths are bytes. `version` is different after each change of the content. `mode` has the
    permission bits; `owner` and `group` are names, if the machine has any for the ids. `resolved`
    is the path that a link leads to in the end, and `resolved_kind` what is there, if anything.
    `labels` are the extended attributes whose names begin with LABEL, without that.
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
    version: str | None = None
    resolved: bytes | None = None
    resolved_kind: FileKind | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileTrouble:
    """Why an operation on a file failed after it was accepted: one of `core.wire.Refusal`."""

    error: str
    message: str


@dataclass(frozen=True)
class FileEnd:
    """The last frame of an operation on a file: the amount, or the error.

    `count` is in bytes, or entries of a list; `is_cut` says that there are more of those. `fact`
    describes the result of a move, a copy or a write.
    """

    count: int = 0
    is_cut: bool = False
    fact: FileFact | None = None
    trouble: FileTrouble | None = None


@dataclass(frozen=True)
class Stat(Operation[FileFact]):
    """Return the metadata of a path. All operations on files are done as a `user` in the user's own
    root, where links are followed.

    With `home_of`, an account, a path may begin with `~` or be relative: then it begins in that
    account's home.
    """

    op = Op.STAT
    asked_by_users = True
    answer = FileFact

    path: bytes
    user: str = "root"
    home_of: str | None = None


@dataclass(frozen=True)
class ListFolder(Operation[Done]):
    """List a directory down to a `depth`, 1 for its own entries. Frames with JSON lists of
    `FileFact` follow, at most `limit` entries in all, and a `FileEnd`."""

    op = Op.LIST_FOLDER
    asked_by_users = True
    answer = Done

    path: bytes
    depth: int = 1
    limit: int = 10_000
    user: str = "root"
    home_of: str | None = None


@dataclass(frozen=True)
class MakeFolder(Operation[FileFact]):
    """Make a directory. With `parents` its parents are made, too, and an existing one is no error
    unless it `is_new`."""

    op = Op.MAKE_FOLDER
    asked_by_users = True
    answer = FileFact

    path: bytes
    parents: bool = False
    mode: int | None = None
    owner: str | None = None
    user: str = "root"
    home_of: str | None = None
    is_new: bool = False


@dataclass(frozen=True)
class Move(Operation[Done]):
    """Move a file or directory; an existing file is replaced if `replaces`. With `parents` missing
    directories are made above the target, for the `owner`. The answer says that it has begun, a
    `FileEnd` that it is done."""

    op = Op.MOVE
    asked_by_users = True
    answer = Done
    is_use = True

    source: bytes
    target: bytes
    replaces: bool = False
    user: str = "root"
    home_of: str | None = None
    parents: bool = False
    owner: str | None = None


@dataclass(frozen=True)
class Copy(Operation[Done]):
    """Copy a file, or a directory with its contents; links remain links. See `Move`."""

    op = Op.COPY
    asked_by_users = True
    answer = Done
    is_use = True

    source: bytes
    target: bytes
    replaces: bool = False
    user: str = "root"
    home_of: str | None = None


@dataclass(frozen=True)
class Remove(Operation[Done]):
    """Remove a file or an empty directory; with `everything`, also its contents. See `Move`."""

    op = Op.REMOVE
    asked_by_users = True
    answer = Done
    is_use = True

    path: bytes
    everything: bool = False
    user: str = "root"
    home_of: str | None = None


@dataclass(frozen=True)
class Read(Operation[FileFact]):
    """Read a file from `offset`, at most `length` bytes: frames follow, and a `FileEnd`.

    The size of a file of /proc or /sys is unreliable, so it is reported as 0, and the file is read
    to its end.
    """

    op = Op.READ
    asked_by_users = True
    answer = FileFact
    is_use = True

    path: bytes
    offset: int = 0
    length: int | None = None
    user: str = "root"
    home_of: str | None = None


@dataclass(frozen=True)
class Write(Operation[Done]):
    """Write a file: the host sends frames of it and an empty one, and a `FileEnd` follows. Until
    then an existing file is unchanged, unless it is written `in_place`.

    Without `mode` or `owner`, those of an existing file are kept. With `if_version` it must have
    that version, or with `*` exist; if it `is_new` it must not exist. With `labels` it has these
    and no others.
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
    home_of: str | None = None
    if_version: str | None = None
    is_new: bool = False
    labels: Mapping[str, str] | None = None


class ChangeKind(StrEnum):
    """What happened to a file."""

    CREATED = "created"
    MODIFIED = "modified"
    ATTRIBUTES = "attributes"  # its mode, its owner, its times
    REMOVED = "removed"
    MOVED = "moved"
    OVERFLOW = "overflow"  # changes were lost: read the directory again


@dataclass(frozen=True)
class FileChange:
    """A change in a watched directory; what was `MOVED` came from `source`."""

    path: bytes
    kind: ChangeKind
    is_folder: bool = False
    source: bytes | None = None


@dataclass(frozen=True)
class WatchFolder(Operation[Done]):
    """Watch a directory from the answer on, with `recursive` everything below it. Frames with JSON
    lists of `FileChange` follow, and a `FileEnd` when it no longer exists.

    Watching does not count as a use of the sandbox.
    """

    op = Op.WATCH_FOLDER
    asked_by_users = True
    answer = Done

    path: bytes
    recursive: bool = False
    user: str = "root"
    home_of: str | None = None


@dataclass(frozen=True)
class Watched:
    """A watch that the agent keeps, by its id."""

    watch: str


@dataclass(frozen=True)
class OpenWatch(Operation[Watched]):
    """Watch a directory, as `WatchFolder` does, and keep the changes until they are read. The watch
    outlives this connection."""

    op = Op.OPEN_WATCH
    asked_by_users = True
    answer = Watched

    path: bytes
    recursive: bool = False
    user: str = "root"
    home_of: str | None = None


@dataclass(frozen=True)
class Changes:
    """Changes in a watched directory, in order; `has_more` if they did not fit into one answer."""

    items: Sequence[FileChange]
    has_more: bool = False


@dataclass(frozen=True)
class ReadWatch(Operation[Changes]):
    """Return the changes since the last time, up to now."""

    op = Op.READ_WATCH
    asked_by_users = True
    answer = Changes

    watch: str


@dataclass(frozen=True)
class CloseWatch(Operation[Done]):
    """End a watch."""

    op = Op.CLOSE_WATCH
    asked_by_users = True
    answer = Done

    watch: str


FileOperation = Stat | ListFolder | MakeFolder | Move | Copy | Remove | Read | Write | WatchFolder
"""What is asked of files."""
KeptWatch = OpenWatch | ReadWatch | CloseWatch
"""What is asked of the watches that the agent keeps."""


@dataclass(frozen=True)
class Dial(Operation[Done]):
    """Connect to a port in the machine; raw bytes follow in both directions.

    With a `host`, the machine connects to a port there, as its own programs would. With a `path`,
    it connects to a Unix socket.
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
    """The machine listens at a `port` or a `path` until the connection ends. A frame with a JSON
    `Caller` follows for each incoming connection."""

    port: int = 0
    path: str = ""


@dataclass(frozen=True)
class Caller:
    """An incoming connection from an address, which waits for `Take`."""

    number: int
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class Listen(Operation[Listening]):
    """Listen in the machine: on a `host`'s port, 0 for any free one; at a `path`, on a Unix socket
    of the `user`; or without either on a socket in a new directory that only the `user` may enter.

    An existing socket at the path is replaced if it has no listener.
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
    """Take an incoming connection of a `Listen`; raw bytes follow in both directions."""

    op = Op.TAKE
    asked_by_users = True
    answer = Done
    used_by_bytes = True

    number: int


@dataclass(frozen=True)
class Sample:
    """The machine's resource usage at a time, in milliseconds since the epoch. The CPU's is the
    average since the sample before."""

    at_ms: int
    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int


@dataclass(frozen=True)
class Figures:
    """The machine's resource usage: 100 % is one CPU, `uptime` is in seconds.

    For a window only `recent_cpu_percent` is set, which costs less. `earlier` are samples of the
    last hour, one every 15 s while the machine ran, if they were asked for.
    """

    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    disk_used_bytes: int | None = None
    disk_total_bytes: int | None = None
    uptime: float | None = None
    recent_cpu_percent: float | None = None
    earlier: Sequence[Sample] = ()


@dataclass(frozen=True)
class Stats(Operation[Figures]):
    """Return the resource usage; with `window_s`, the CPU usage of users' programs in that time;
    with `since_ms`, the samples since that time as well."""

    op = Op.STATS
    answer = Figures

    window_s: float | None = None
    since_ms: int | None = None


AnyOperation = (
    Hello
    | Wake
    | MountAll
    | Unmount
    | Flush
    | Trust
    | SetUp
    | Execute
    | Start
    | Run
    | Pipe
    | Attach
    | List
    | Signal
    | Input
    | Feed
    | Resize
    | FileOperation
    | KeptWatch
    | Dial
    | Listen
    | Take
    | Stats
)
"""Every operation that there is."""

_BY_OP: Mapping[str, type[AnyOperation]] = {kind.op.value: kind for kind in get_args(AnyOperation)}


def request_of(operation: Operation[Any], token: str, *, again: bool = False) -> Request:
    """Return the request for an operation; see core.wire for `again`."""
    return Request(operation.op.value, token, encode(operation), again=again)


def may_be_followed(operation: Operation[Any]) -> bool:
    """Tell whether another operation may follow on the same connection."""
    match operation:
        case Execute():
            return not operation.stdin  # its late output would be mistaken for the next answer
        case Run():
            return False
        case Hello() | SetUp() | Wake() | MountAll() | Unmount() | Trust() | Flush() | Stats():
            return True
        case Start() | List() | Signal() | Input() | Resize() | ReadWatch() | CloseWatch():
            return True
        case _:
            return False


def operation_of(op: str, args: Mapping[str, object]) -> AnyOperation:
    """Return the requested operation.

    Raises:
        UnknownOperationError: there is no such operation.
        CodecError: its arguments are invalid.
    """
    kind = _BY_OP.get(op)
    if kind is None:
        raise UnknownOperationError(f"there is no operation {op[:40]!r}")
    operation: AnyOperation = decode(kind, args)
    return operation


def answer_of(operation: Operation[AnswerT], values: Mapping[str, object]) -> AnswerT:
    """Return an agent's answer.

    Raises:
        CodecError: the answer is invalid.
    """
    answer: AnswerT = decode(operation.answer, values)
    return answer
