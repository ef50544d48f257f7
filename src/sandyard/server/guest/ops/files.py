"""STAT, LIST_FOLDER, MAKE_FOLDER, MOVE, COPY, REMOVE, READ, WRITE, WATCH_FOLDER.

A child in the user's root and account does the work: the kernel checks the user's rights, links
lead where they lead for the user, and if a file system blocks, only the child waits.
"""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import stat as stats
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode
from sandyard.server.guest import processes, system
from sandyard.server.guest.context import Context
from sandyard.server.guest.parts import is_in_part, part_of
from sandyard.server.guest.system import Account, ConflictingError, RefusedError

if TYPE_CHECKING:
    from sandyard.server.guest.watch import Watcher

_CHILDREN_MAX = 64
_WATCHES_MAX = 32
_PIECE = wire.FRAME_MAX
_ENTRIES_A_FRAME = 200
_ENTRIES_MAX = 100_000
_DEPTH_MAX = 64
_NAMES_MAX = 1024 * 1024
_LOW, _HIGH = 3, 100
_LATE_S = 10.0
_MOMENT_S = 2.0
_FIGURE_MAX = 2**62
_DEEP = 50_000
_SMALL = 64 * 1024
_MODES = 0o7777
_LABELS_MAX, _LABEL_BYTES = 64, 4096
_READINGS_MAX = 200
_KINDS = {
    stats.S_IFREG: ops.FileKind.FILE, stats.S_IFDIR: ops.FileKind.FOLDER,
    stats.S_IFLNK: ops.FileKind.LINK,
}  # fmt: skip
_CODES = {
    errno.ENOENT: wire.Refusal.ABSENT,
    errno.EEXIST: wire.Refusal.EXISTS,
    errno.ENOTEMPTY: wire.Refusal.EXISTS,
    errno.ENOTDIR: wire.Refusal.NOT_A_FOLDER,
    errno.EISDIR: wire.Refusal.IS_A_FOLDER,
    errno.EACCES: wire.Refusal.DENIED,
    errno.EPERM: wire.Refusal.DENIED,
    errno.EROFS: wire.Refusal.DENIED,
    errno.ENOSPC: wire.Refusal.NO_SPACE,
    errno.EDQUOT: wire.Refusal.NO_SPACE,
    errno.EBUSY: wire.Refusal.CONFLICT,
}
_children: set[int] = set()
_watching: set[int] = set()


class _TroubleError(Exception):
    """An operation on a file failed, and why."""

    def __init__(self, code: wire.Refusal, message: str) -> None:
        super().__init__(message)
        self.trouble = ops.FileTrouble(code.value, message)


async def carry_out(
    context: Context,
    wish: ops.FileOperation,
    connection: socket.socket,
    decoder: wire.Decoder,
) -> None:
    """See the classes of core.ops."""
    # A watch lasts for hours: nothing else must wait for it.
    among, most = _children, _CHILDREN_MAX
    if isinstance(wish, ops.WatchFolder):
        among, most = _watching, _WATCHES_MAX
    if len(among) >= most:
        what = (
            "directories are watched" if among is _watching else "operations on files are under way"
        )
        raise ConflictingError(f"cannot do that now: {most} {what}")
    pid = fork_child(context, wish, connection, decoder)
    among.add(pid)
    try:
        await until_ended(pid, connection)
    finally:
        among.discard(pid)


def fork_child(
    context: Context,
    wish: ops.FileOperation,
    connection: socket.socket,
    decoder: wire.Decoder,
) -> int:
    """Start a child that carries out an operation on a connection, and return its pid.

    Raises:
        RefusedError: there is no such account, or the path cannot be one.
    """
    wish = _placed(context, wish)
    account = system.find_account(context.root_fd, wish.user)
    owner = None
    if isinstance(wish, ops.MakeFolder | ops.Write | ops.Move) and wish.owner is not None:
        owner = system.find_account(context.root_fd, wish.owner)
    try:
        return processes.fork(
            lambda: _Child(context.root_fd, account, owner, connection, decoder).serve(wish)
        )
    except OSError as error:
        raise RefusedError(f"cannot do that in the sandbox: {error.strerror}") from error


def _placed(context: Context, wish: ops.FileOperation) -> ops.FileOperation:
    """Return an operation with absolute paths."""
    if wish.home_of is not None:
        home = os.fsencode(system.find_account(context.root_fd, wish.home_of).home)
        if isinstance(wish, ops.Move | ops.Copy):
            wish = replace(
                wish, source=_below_home(wish.source, home), target=_below_home(wish.target, home)
            )
        else:
            wish = replace(wish, path=_below_home(wish.path, home))
    for path in _paths_of(wish):
        if not path.startswith(b"/") or b"\0" in path:
            raise RefusedError(f"cannot use the path {_shown(path)}: it must begin with /")
    return wish


def _below_home(path: bytes, home: bytes) -> bytes:
    if path.startswith(b"~"):
        user, slash, rest = path[1:].partition(b"/")
        if user:
            raise RefusedError(f"cannot use the path {_shown(path)}: write ~ for your own home")
        path = rest.lstrip(b"/") if slash else b""
    # normpath keeps a leading //, as POSIX allows; Linux treats it as /.
    return b"/" + os.path.normpath(os.path.join(home, path)).lstrip(b"/")


async def until_ended(pid: int, connection: socket.socket) -> None:
    """Return once a child has ended. If its host disconnects, it has a moment and is then
    killed."""
    pidfd = os.pidfd_open(pid)
    try:
        with select.epoll() as watched:
            watched.register(connection, select.EPOLLRDHUP)
            async with asyncio.TaskGroup() as tasks:
                gone = tasks.create_task(_end_when_gone(pid, watched.fileno()))
                try:
                    await processes.readable(pidfd)
                finally:
                    gone.cancel()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(pidfd)
        os.waitpid(pid, 0)


async def _end_when_gone(pid: int, watched: int) -> None:
    await processes.readable(watched)
    for number in (signal.SIGTERM, signal.SIGKILL):
        await asyncio.sleep(_MOMENT_S)
        os.kill(pid, number)  # not reaped yet, so the pid is still this child's


class _Child:
    """Does the work in its own process, which may block."""

    def __init__(
        self,
        root_fd: int,
        account: Account,
        owner: Account | None,
        connection: socket.socket,
        decoder: wire.Decoder,
    ) -> None:
        self._root_fd = root_fd
        self._account = account
        self._owner = owner
        self._connection = connection
        self._decoder = decoder
        self._has_answered = False
        self._names: dict[tuple[str, int], str | None] = {}
        self._watcher: Watcher | None = None

    def serve(self, wish: ops.FileOperation) -> None:
        """Carry out an operation and answer the host; never returns to the agent."""
        # The other connections must not be kept open by a child that takes long.
        kept = [
            fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, _HIGH)
            for one in (self._connection.fileno(), self._root_fd)
        ]
        connection, root = (os.dup2(one, _LOW + at) for at, one in enumerate(kept))
        os.closerange(root + 1, os.sysconf("SC_OPEN_MAX"))
        self._connection = socket.socket(fileno=connection)
        self._connection.setblocking(True)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _break_off)
        sys.setrecursionlimit(_DEEP)  # a tree of folders may be as deep as it likes
        if isinstance(wish, ops.WatchFolder):
            # From the agent's root, not the user's, whose files may be missing or slow.
            from sandyard.server.guest.watch import Watcher

            self._watcher = Watcher()
        processes.step_down(self._account, root)
        os.close(root)
        os.umask(0o022)
        try:
            self._carry_out(wish)
        except _TroubleError as error:
            self._refuse(error.trouble)
        except OSError as error:
            self._refuse(_trouble_of(error, _paths_of(wish)[0]))
        except _GoneError:
            pass
        except Exception as error:  # noqa: BLE001 - the host must hear of it, whatever it is
            message = f"{_shown(_paths_of(wish)[0])}: it cannot be done: {type(error).__name__}"
            self._refuse(ops.FileTrouble(wire.Refusal.BAD_REQUEST.value, message))

    def _carry_out(self, wish: ops.FileOperation) -> None:
        match wish:
            case ops.Stat():
                self._answer(self._fact(wish.path))
            case ops.ListFolder():
                self._list(wish)
            case ops.MakeFolder():
                self._make_folder(wish)
            case ops.Move() | ops.Copy():
                self._make_way(wish)
                if isinstance(wish, ops.Move) and wish.parents:
                    self._make_parents(wish.target)
                self._work(wish.source, lambda: self._transfer(wish))
            case ops.Remove():
                self._check_remove(wish)
                self._work(wish.path, lambda: _remove(wish.path, everything=wish.everything))
            case ops.Read():
                self._read(wish)
            case ops.Write():
                self._write(wish)
            case ops.WatchFolder():
                self._watch(wish)

    # --- answers ----------------------------------------------------------------------------

    def _work(self, path: bytes, work: Callable[[], ops.FileFact | None]) -> None:
        """Answer that something has begun that may take long, do it, and send its end."""
        self._answer(ops.Done())
        try:
            end = ops.FileEnd(1, fact=work())
        except _TroubleError as error:
            end = ops.FileEnd(trouble=error.trouble)
        except OSError as error:
            end = ops.FileEnd(trouble=_trouble_of(error, path))
        except RecursionError:
            message = f"{_shown(path)}: it is too deep"
            end = ops.FileEnd(trouble=ops.FileTrouble(wire.Refusal.BAD_REQUEST.value, message))
        self._end(end)

    def _transfer(self, wish: ops.Move | ops.Copy) -> ops.FileFact:
        """Move or copy, through a temporary name if that takes time."""
        if isinstance(wish, ops.Move):
            try:
                os.rename(wish.source, wish.target)
                return self._fact(wish.target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        part = part_of(wish.target, replaces=wish.replaces)
        try:
            _copy(wish.source, part, keeps_owner=isinstance(wish, ops.Move))
            if not wish.replaces and os.path.lexists(wish.target):
                raise FileExistsError(errno.EEXIST, "it exists", wish.target)
            os.rename(part, wish.target)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(part, everything=True)
            raise
        if isinstance(wish, ops.Move):
            _remove(wish.source, everything=True)
        return self._fact(wish.target)

    def _answer(self, value: object) -> None:
        self._has_answered = True
        self._connection.sendall(wire.encode_answer(wire.Answer(encode(value))))

    def _refuse(self, trouble: ops.FileTrouble) -> None:
        answer = wire.Answer({}, error=trouble.error, message=trouble.message)
        if self._has_answered:  # then the host is gone
            return
        with contextlib.suppress(OSError):
            self._connection.sendall(wire.encode_answer(answer))

    def _send(self, channel: wire.Channel, payload: bytes) -> None:
        self._connection.sendall(wire.encode_frame(channel, payload))

    def _end(self, end: ops.FileEnd) -> None:
        self._send(wire.Channel.EXIT, json.dumps(encode(end)).encode())

    def _fact(self, path: bytes) -> ops.FileFact:
        found = os.lstat(path)
        is_link = stats.S_ISLNK(found.st_mode)
        resolved, resolved_kind = _end_of_link(path) if is_link else (None, None)
        return ops.FileFact(
            path=path,
            kind=_KINDS.get(stats.S_IFMT(found.st_mode), ops.FileKind.OTHER),
            size=found.st_size,
            mode=stats.S_IMODE(found.st_mode),
            uid=found.st_uid,
            gid=found.st_gid,
            modified_ms=max(0, min(_FIGURE_MAX, found.st_mtime_ns // 1_000_000)),
            owner=self._name("passwd", found.st_uid),
            group=self._name("group", found.st_gid),
            target=os.readlink(path) if is_link else None,
            version=None if is_link else _version_of(found),  # a link's is not its target's
            resolved=resolved,
            resolved_kind=resolved_kind,
            labels=_labels_of(path),
        )

    def _name(self, table: str, number: int) -> str | None:
        """Return the name of an account or group in the user's root."""
        if (table, number) not in self._names:
            name = None
            with contextlib.suppress(OSError):
                descriptor = os.open(f"/etc/{table}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                with os.fdopen(descriptor, errors="replace") as file:
                    for line in file.read(_NAMES_MAX).splitlines():
                        fields = line.split(":")
                        if len(fields) > 2 and fields[2] == str(number):
                            name = fields[0][:64]
                            break
            self._names[table, number] = name
        return self._names[table, number]

    # --- operations -------------------------------------------------------------------------

    def _list(self, wish: ops.ListFolder) -> None:
        limit = max(1, min(_ENTRIES_MAX, wish.limit))
        os.scandir(wish.path).close()  # errors are reported before anything else
        self._answer(ops.Done())
        count, is_cut, batch = 0, False, []
        for path in _below(wish.path, max(1, min(_DEPTH_MAX, wish.depth))):
            if count == limit:
                is_cut = True
                break
            try:
                batch.append(encode(self._fact(path)))
            except OSError:  # gone meanwhile
                continue
            count += 1
            if len(batch) == _ENTRIES_A_FRAME:
                self._send_entries(batch)
                batch = []
        self._send_entries(batch)
        self._end(ops.FileEnd(count, is_cut))

    def _send_entries(self, batch: list[object]) -> None:
        """Send entries, in as many frames as their paths need."""
        payload = json.dumps(batch).encode()
        if len(payload) > wire.FRAME_MAX and len(batch) > 1:
            self._send_entries(batch[: len(batch) // 2])
            self._send_entries(batch[len(batch) // 2 :])
        elif batch:
            self._send(wire.Channel.STDOUT, payload)

    def _make_folder(self, wish: ops.MakeFolder) -> None:
        mode = 0o755 if wish.mode is None else wish.mode & _MODES
        if wish.parents:
            self._make_parents(wish.path)
        try:
            os.mkdir(wish.path)
        except FileExistsError:
            if wish.is_new and not os.path.isdir(wish.path):
                raise NotADirectoryError(
                    errno.ENOTDIR, "it is not a directory", wish.path
                ) from None
            if wish.is_new or not (wish.parents and os.path.isdir(wish.path)):
                raise
        else:
            self._own(wish.path)
            os.chmod(wish.path, mode)
        self._answer(self._fact(wish.path))

    def _make_parents(self, path: bytes) -> None:
        missing = []
        folder = os.path.dirname(path.rstrip(b"/"))
        while folder not in (b"", b"/") and not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for one in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(one, 0o755)
                self._own(one)

    def _own(self, path: "bytes | int") -> None:
        if self._owner is not None:
            os.chown(path, self._owner.uid, self._owner.gid)

    def _make_way(self, wish: ops.Move | ops.Copy) -> None:
        """Refuse what a move or copy must not do."""
        source = os.lstat(wish.source)
        inside = os.path.join(os.path.realpath(wish.source), b"")
        if stats.S_ISDIR(source.st_mode) and os.path.realpath(wish.target).startswith(inside):
            raise _TroubleError(
                wire.Refusal.BAD_REQUEST, f"cannot put {_shown(wish.source)} inside itself"
            )
        try:
            target = os.lstat(wish.target)
        except FileNotFoundError:
            return
        if not wish.replaces:
            raise FileExistsError(errno.EEXIST, "it exists", wish.target)
        if stats.S_ISDIR(target.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a directory", wish.target)
        if stats.S_ISDIR(source.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", wish.target)
        if os.path.samestat(source, target):
            raise _TroubleError(wire.Refusal.BAD_REQUEST, f"{_shown(wish.source)} is the same file")

    def _check_remove(self, wish: ops.Remove) -> None:
        if os.path.realpath(wish.path) == b"/":
            raise _TroubleError(wire.Refusal.BAD_REQUEST, "cannot remove the whole file system")
        if stats.S_ISDIR(os.lstat(wish.path).st_mode) and not wish.everything:
            with os.scandir(wish.path) as entries:
                if next(entries, None) is not None:
                    raise OSError(errno.ENOTEMPTY, "the directory is not empty", wish.path)

    def _read(self, wish: ops.Read) -> None:
        # So as not to wait for a writer of a pipe.
        descriptor = os.open(wish.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if stats.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a directory", wish.path)
        if not stats.S_ISREG(found.st_mode):
            raise _TroubleError(wire.Refusal.BAD_REQUEST, f"{_shown(wish.path)} is no plain file")
        # A file with a size and no blocks is generated when it is read (/sys), or is one hole.
        size = found.st_size if found.st_blocks or found.st_size > _SMALL else 0
        left, sent = wish.length, 0
        if size and wish.offset > size:
            left = 0
        elif wish.offset:
            os.lseek(descriptor, wish.offset, os.SEEK_SET)
        version = _version_of(found) if size or not found.st_size else None
        fact = replace(
            self._fact(wish.path), kind=ops.FileKind.FILE, size=size, version=version
        )  # of what is open: it may be replaced at any moment
        self._answer(fact)
        try:
            while left is None or left > 0:
                data = os.read(descriptor, _PIECE if left is None else min(_PIECE, left))
                if not data:
                    break
                self._send(wire.Channel.STDOUT, data)
                sent += len(data)
                left = None if left is None else left - len(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                raise
            self._end(ops.FileEnd(sent, trouble=_trouble_of(error, wish.path)))
            return
        self._end(ops.FileEnd(sent))

    def _write(self, wish: ops.Write) -> None:
        before = self._before(wish)
        # A link is followed, and its target written, as by any editor.
        path = os.path.realpath(wish.path)
        if wish.in_place:
            part, flags = path, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if wish.is_new else 0)
            _check_version(wish, path)
        else:
            if before is not None:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # may it be written at all?
            part = part_of(path, replaces=before is not None)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(part, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        is_done = False
        try:
            self._own_file(descriptor, wish, before)
            # Only after everything that may be refused; to watchers it is a change of its own.
            if wish.in_place and os.fstat(descriptor).st_size:
                os.ftruncate(descriptor, 0)
            self._answer(ops.Done())
            try:
                count = self._take(descriptor)
                fact = replace(self._fact(part), path=path)
                if not wish.in_place:
                    _put(wish, part, path)
                is_done = True
            except _TroubleError as error:
                self._end(ops.FileEnd(trouble=error.trouble))
                return
            except OSError as error:
                if isinstance(error, ConnectionError):
                    raise
                self._end(ops.FileEnd(trouble=_trouble_of(error, wish.path)))
                self._hear_out()
                return
            self._end(ops.FileEnd(count, fact=fact))
        except _GoneError:
            return  # the host disconnected: nothing of the file must remain
        finally:
            os.close(descriptor)
            if not is_done and not wish.in_place:
                with contextlib.suppress(OSError):
                    os.unlink(part)

    def _before(self, wish: ops.Write) -> os.stat_result | None:
        """Return the file that is to be replaced, and make the directories above a new one."""
        if wish.parents:
            self._make_parents(wish.path)
        try:
            before = os.stat(wish.path)
        except FileNotFoundError:
            return None
        if stats.S_ISDIR(before.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a directory", wish.path)
        if not stats.S_ISREG(before.st_mode):
            raise _TroubleError(wire.Refusal.BAD_REQUEST, f"{_shown(wish.path)} is no plain file")
        return before

    def _own_file(self, descriptor: int, wish: ops.Write, before: os.stat_result | None) -> None:
        if self._owner is not None:
            os.fchown(descriptor, self._owner.uid, self._owner.gid)
        elif before is not None and not wish.in_place and self._account.uid == 0:
            os.fchown(descriptor, before.st_uid, before.st_gid)
        if wish.mode is not None:
            os.fchmod(descriptor, wish.mode & _MODES)
        elif before is not None and not wish.in_place:
            os.fchmod(descriptor, stats.S_IMODE(before.st_mode))
        if wish.labels is not None:
            _label(descriptor, wish.labels)

    def _take(self, descriptor: int) -> int:
        """Write what the host sends, and return its size.

        Raises:
            _GoneError: it ended before its end was announced.
        """
        count = 0
        while True:
            while (frame := self._decoder.take_frame()) is None:
                data = self._connection.recv(_PIECE)
                if not data:
                    raise _GoneError
                self._decoder.feed(data)
            if frame.channel is not wire.Channel.STDIN:
                raise _GoneError
            if not frame.payload:
                return count
            view = memoryview(frame.payload)
            while view:
                view = view[os.write(descriptor, view) :]
            count += len(frame.payload)

    def _watch(self, wish: ops.WatchFolder) -> None:
        from sandyard.server.guest.watch import TooManyError

        watcher = self._watcher
        assert watcher is not None  # created before the user's root was entered
        try:
            watcher.open(wish.path, recursive=wish.recursive)
        except TooManyError as error:
            raise _TroubleError(
                wire.Refusal.CONFLICT,
                f"{_shown(wish.path)}: no more directories can be watched; see "
                "fs.inotify.max_user_watches and max_user_instances of the sandbox",
            ) from error
        self._answer(ops.Done())
        with select.epoll() as poller:
            poller.register(watcher.fileno(), select.EPOLLIN)
            poller.register(self._connection, select.EPOLLRDHUP | select.EPOLLIN)
            while not watcher.is_over:
                events = dict(poller.poll())
                asked = events.get(self._connection.fileno(), 0)
                if asked & ~select.EPOLLIN:
                    return  # the host has disconnected
                self._send_entries([encode(one) for one in watcher.changes()])
                if asked:
                    self._flush(watcher)
        gone = ops.FileTrouble(
            wire.Refusal.ABSENT.value, f"{_shown(wish.path)}: the directory is gone"
        )
        self._end(ops.FileEnd(trouble=gone))

    def _flush(self, watcher: "Watcher") -> None:
        """Send every change up to now, and an empty frame for each byte that asked for it: the
        agent keeps them for a client."""
        asked = len(self._connection.recv(_PIECE))
        for _ in range(_READINGS_MAX):  # of what a busy directory adds meanwhile, not all
            if watcher.is_over or not select.select([watcher.fileno()], [], [], 0)[0]:
                break
            self._send_entries([encode(one) for one in watcher.changes()])
        for _ in range(asked):
            self._send(wire.Channel.STDOUT, b"")

    def _hear_out(self) -> None:
        """Read what the host still sends: a reset could lose the answer."""
        self._connection.settimeout(_LATE_S)
        with contextlib.suppress(OSError):
            while self._connection.recv(_PIECE):
                pass


class _GoneError(Exception):
    """The host disconnected midway."""


def _below(folder: bytes, depth: int) -> Iterator[bytes]:
    """Yield the paths in a directory by name, each directory followed by its contents."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((one.name, one.is_dir(follow_symlinks=False)) for one in entries)
    except OSError:  # an unreadable directory is listed without its entries
        return
    for name, is_folder in found:
        path = os.path.join(folder, name)
        yield path
        if is_folder and depth > 1:
            yield from _below(path, depth - 1)


def _copy(source: bytes, target: bytes, *, keeps_owner: bool) -> None:
    """Copy a path. The copy belongs to the user who copies, without rights that would give away
    another user's; a move across file systems keeps owner and rights."""
    found = os.lstat(source)
    if stats.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(source), target)
        if keeps_owner:
            os.lchown(target, found.st_uid, found.st_gid)
        return
    if stats.S_ISDIR(found.st_mode):
        os.mkdir(target, 0o700)
        with os.scandir(source) as entries:
            names = [one.name for one in entries]
        for name in names:
            _copy(os.path.join(source, name), os.path.join(target, name), keeps_owner=keeps_owner)
    elif stats.S_ISREG(found.st_mode):
        shutil.copyfile(source, target, follow_symlinks=False)
    else:
        raise _TroubleError(wire.Refusal.BAD_REQUEST, f"{_shown(source)} is no plain file")
    if keeps_owner:
        os.chown(target, found.st_uid, found.st_gid)
    os.chmod(target, stats.S_IMODE(found.st_mode) & (_MODES if keeps_owner else 0o1777))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _remove(path: bytes, *, everything: bool) -> None:
    if not stats.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
    elif everything:
        shutil.rmtree(path)
    else:
        os.rmdir(path)


def _end_of_link(path: bytes) -> tuple[bytes, ops.FileKind | None]:
    """Return where a link leads in the end, and what is there; itself if it leads nowhere."""
    try:
        resolved = os.path.realpath(path, strict=True)
        found = os.stat(path)
    except OSError:
        return path, None
    return resolved, _KINDS.get(stats.S_IFMT(found.st_mode), ops.FileKind.OTHER)


def _labels_of(path: bytes) -> dict[str, str]:
    """Return the labels of a file; none where the file system has none."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for name in os.listxattr(path, follow_symlinks=False)[:_LABELS_MAX]:
            if name.startswith(ops.LABEL):
                value = os.getxattr(path, name, follow_symlinks=False)[:_LABEL_BYTES]
                found[name.removeprefix(ops.LABEL)] = value.decode(errors="replace")
    return found


def _label(descriptor: int, labels: Mapping[str, str]) -> None:
    with contextlib.suppress(OSError):  # a file system that has none
        for name in os.listxattr(descriptor):
            if name.startswith(ops.LABEL) and name.removeprefix(ops.LABEL) not in labels:
                os.removexattr(descriptor, name)
    for name, value in labels.items():
        os.setxattr(descriptor, ops.LABEL + name, value.encode())


def _break_off(number: int, frame: object) -> None:
    raise _GoneError


def _paths_of(wish: ops.FileOperation) -> tuple[bytes, ...]:
    if isinstance(wish, ops.Move | ops.Copy):
        return (wish.source, wish.target)
    return (wish.path,)


def _version_of(found: os.stat_result) -> str:
    # A file that is replaced is another inode; the time alone is as coarse as the kernel's clock.
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def _put(wish: ops.Write, part: bytes, path: bytes) -> None:
    """Put a new file in its place, if the condition of the write still holds: an upload may take
    long."""
    with _held(os.path.dirname(path)) if wish.if_version is not None else contextlib.nullcontext():
        _check_version(wish, path)
        if not wish.is_new:
            os.rename(part, path)
            return
    try:
        os.link(part, path)  # a rename would replace what appears now
    except FileExistsError:
        _check_version(wish, path)
        raise
    os.unlink(part)


@contextlib.contextmanager
def _held(folder: bytes) -> Iterator[None]:
    """Have one at a time check a file of a directory and replace it."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # one that must not be read, or cannot be locked
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _check_version(wish: ops.Write, path: bytes) -> None:
    """Return if the file at a path is the one that the caller knows."""
    if wish.if_version is None and not wish.is_new:
        return
    try:
        version = _version_of(os.stat(path))
    except FileNotFoundError:
        if wish.if_version is None:
            return
        raise _TroubleError(wire.Refusal.CHANGED, f"{_shown(wish.path)} does not exist") from None
    if wish.is_new:
        raise _TroubleError(wire.Refusal.CHANGED, f"{_shown(wish.path)} exists already")
    if wish.if_version not in ("*", version):
        raise _TroubleError(wire.Refusal.CHANGED, f"{_shown(wish.path)} has changed meanwhile")


def _trouble_of(error: OSError, path: bytes) -> ops.FileTrouble:
    """Return an error in the form in which it is sent."""
    code = _CODES.get(error.errno or 0, wire.Refusal.BAD_REQUEST)
    named = error.filename2 or error.filename
    which = os.fsencode(named) if isinstance(named, bytes | str) else path
    if is_in_part(which):
        which = path  # the name of an unfinished file says nothing to a user
    words = (error.strerror or "it cannot be done").lower()
    return ops.FileTrouble(code.value, f"{_shown(which)}: {words}")


def _shown(path: bytes) -> str:
    return path.decode(errors="replace")[:300]
