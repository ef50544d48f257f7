"""START, RUN, ATTACH, LIST, SIGNAL, INPUT, FEED, RESIZE: processes that belong to the agent."""

import asyncio
import contextlib
import dataclasses
import json
import os
import select
import shlex
import signal
import socket
import stat
import time
from collections.abc import Coroutine
from functools import partial

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode
from sandyard.server.guest import processes, system
from sandyard.server.guest.context import SHELLS, Context, shell_programs
from sandyard.server.guest.plain import is_plain, words_of
from sandyard.server.guest.streams import answer, receive
from sandyard.server.guest.system import ConflictingError, NoProcessError, RefusedError
from sandyard.server.guest.table import LIVING_MAX, Entry, Follower, shown

_ARGUMENT_MAX = 128 * 1024 - 1  # the kernel's limit for one argument (MAX_ARG_STRLEN)
_FD = processes.SCRIPT
_FIRST_READER_S = 10.0
_INPUT_LIMIT_S = 5.0
_PEEK_S = 1.0
_AFTER_INPUT_S = 60.0
_LIST_MAX = wire.HEAD_MAX * 3 // 4


async def carry_out(
    context: Context,
    wish: ops.Start | ops.List | ops.Signal | ops.Input | ops.Resize,
    connection: socket.socket,
) -> object:
    """Carry out an operation, and return its answer."""
    match wish:
        case ops.Start():
            begin = partial(start, context, wish, connection)
            return (await context.repeats.once(wish, begin)).program()
        case ops.List():
            return _listed(context, wish)
        case ops.Signal():
            return _send_signal(context, wish)
        case ops.Input():
            return await _feed(context, wish)
        case ops.Resize():
            context.table.find(wish.pid, wish.tag).resize(wish.terminal)
            return ops.Done()


async def start(
    context: Context, wish: ops.Start, connection: socket.socket, *, is_kept: bool = True
) -> Entry:
    """See core.ops.Start. A process that is not kept cannot be found after its end.

    Raises: see `Starts.turn`; `connection` is the host's.
        NoProcessError: the process that it was to replace was replaced, or its tag removed.
    """
    if context.table.living() >= LIVING_MAX:
        raise ConflictingError(
            f"cannot start a process: {LIVING_MAX} run already; end some of them first"
        )
    if wish.command is not None and wish.argv:
        raise RefusedError("cannot start a process: give it a command or an argv")
    if wish.command is None and not wish.argv and not wish.login:
        raise RefusedError("cannot start a process: give it a command or an argv")
    account = system.find_account(context.root_fd, wish.user)
    env = await context.login_environment(account)
    env |= context.env
    if wish.terminal is not None:
        env.setdefault("TERM", "xterm-256color")
    env |= system.checked_environment(wish.env)
    programs, script, name = _programs_of(wish, env, account)
    words = None
    if wish.command is not None and not wish.login and script is None and is_plain(env):
        words = words_of(wish.command)
    cwd = wish.cwd
    if cwd == "~" or cwd.startswith("~/"):
        cwd = os.path.normpath(_home_of(context, account) + cwd[1:])
    note = None
    if wish.login:
        host = env.get("SSH_CONNECTION", "").partition(" ")[0]
        note = partial(_note_login, context, account.name, host)
    async with context.starts.turn(connection):
        process = await processes.start(
            processes.Spec(
                on_terminal=note,
                name=name,
                programs=programs,
                env=env,
                cwd=cwd,
                account=account,
                script=script,
                terminal=None
                if wish.terminal is None
                else (wish.terminal.columns, wish.terminal.rows),
                is_kept=is_kept,
                words=words,
                alias=f"-{os.path.basename(name)}" if _is_login_shell(wish) else None,
            ),
            root_fd=context.root_fd,
            wants_stdin=wish.stdin,
        )
    started = ops.Program(
        pid=process.pid,
        command=shown(wish.command or shlex.join(wish.argv) or name),
        cwd=cwd,
        user=wish.user,
        started_ms=round(time.time() * 1000),
        printed=0,
        tag=wish.tag,
        terminal=wish.terminal,
    )
    at_end = None
    if note is not None and process.terminal is not None:
        at_end = partial(note, process.terminal, None)
    entry = Entry(
        process, started, waits_s=_FIRST_READER_S, hang_up_s=wish.hang_up_s, at_end=at_end
    )
    limit_s = None if wish.timeout_ms is None else wish.timeout_ms / 1000
    if wish.replaces is not None:
        last = context.table.last_with(wish.tag)
        if last is None or last.started.pid != wish.replaces:
            entry.forget_tag()
            context.table.keep(entry, limit_s=limit_s, keeps_end=False)
            with contextlib.suppress(ConflictingError):  # it may have ended already
                entry.signal(signal.SIGKILL, everything=True)
            raise NoProcessError(f"cannot replace the process {wish.replaces}: it was replaced")
        last.forget_tag()
    context.table.keep(entry, limit_s=limit_s, keeps_end=is_kept)
    return entry


def _note_login(context: Context, user: str, host: str, terminal: str, pid: int | None) -> None:
    """Record that a user is logged in on a terminal, or with no pid that the terminal is free."""
    if pid is None:
        context.utmp.note_logout(context.root_fd, terminal)
    else:
        context.utmp.note_login(context.root_fd, pid, terminal, user, host)


async def follow(
    context: Context,
    wish: ops.Run | ops.Pipe | ops.Attach | ops.Feed,
    connection: socket.socket,
    decoder: wire.Decoder,
) -> None:
    """Carry out an operation after whose answer the connection carries a process's streams."""
    match wish:
        case ops.Run():
            await _run(context, wish, connection, decoder)
        case ops.Pipe():
            await _pipe(context, wish, connection, decoder)
        case ops.Attach():
            await _attach(context, wish, connection, decoder)
        case ops.Feed():
            await _pour(context, wish, connection, decoder)


async def _run(
    context: Context, wish: ops.Run, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Run."""
    if wish.line is not None:
        wish = dataclasses.replace(wish, command=os.fsdecode(wish.line), line=None)
    entry = await start(context, wish, connection, is_kept=wish.keeps_end)
    with entry.followed(0) as follower:
        await answer(connection, entry.program())
        await tell(entry, follower, connection, hear_input(entry, connection, decoder))


async def _pipe(
    context: Context, wish: ops.Pipe, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Pipe.

    Raises:
        RefusedError: bytes came before the answer: they would be lost.
    """
    if context.table.living() >= LIVING_MAX:
        raise ConflictingError(
            f"cannot start a process: {LIVING_MAX} run already; end some of them first"
        )
    if decoder.take_raw():
        raise RefusedError("cannot start a process: its input came before it was there")
    account = system.find_account(context.root_fd, wish.user)
    env = await context.login_environment(account)
    env |= context.env
    env |= system.checked_environment(wish.env)
    shells = (account.shell, *SHELLS)
    async with context.starts.turn(connection):
        await answer(connection, ops.Done())
        # From here on it is the program's, which expects blocking reads.
        connection.setblocking(True)
        spec = processes.Spec(
            name=shells[0],
            programs=shell_programs(shells, "-c", wish.command),
            env=env,
            cwd=_home_of(context, account),
            account=account,
            connection=connection.fileno(),
        )
        try:
            process = await processes.start(spec, root_fd=context.root_fd, wants_stdin=False)
        except RefusedError:
            return  # any answer now would be mistaken for the program's output
    try:
        with select.epoll() as watched:
            watched.register(connection, select.EPOLLRDHUP)
            async with asyncio.TaskGroup() as tasks:
                ending = tasks.create_task(_end_after_its_input(process, watched.fileno()))
                await process.wait()
                ending.cancel()
    finally:
        # Background jobs must not keep the connection open.
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        process.release()


async def _end_after_its_input(process: processes.Process, watched: int) -> None:
    """End a process that continues for long after its input has ended."""
    await processes.readable(watched)
    await asyncio.sleep(_AFTER_INPUT_S)
    await process.end()


def _is_login_shell(wish: ops.Start) -> bool:
    return wish.login and wish.command is None and not wish.argv


def _home_of(context: Context, account: system.Account) -> str:
    """Return a user's home, or the root directory if that does not exist, as sshd does."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(os.stat(account.home.lstrip("/") or ".", dir_fd=context.root_fd).st_mode):
            return account.home
    return "/"


def _programs_of(
    wish: ops.Start, env: dict[str, str], account: system.Account
) -> tuple[list[tuple[str, ...]], bytes | None, str]:
    """Return the programs to try, the script to read, and the name for messages."""
    shells = (account.shell, *SHELLS) if wish.login else SHELLS
    if _is_login_shell(wish):
        return shell_programs(shells), None, shells[0]
    if wish.command is not None:
        command, script = wish.command, None
        if len(os.fsencode(command)) > _ARGUMENT_MAX:
            # Read completely and closed before it runs, it behaves as if it were an argument.
            command, script = (
                f'eval "exec {_FD}<&-; $(/bin/cat <&{_FD} || echo exit 127)"',
                os.fsencode(command),
            )
        return shell_programs(shells, "-c", command), script, shells[0]
    name, *rest = wish.argv
    if any("\0" in one for one in wish.argv) or not name:
        raise RefusedError("cannot start a process: its argv has a word that cannot be one")
    if "/" in name:
        return [(name, *rest)], None, name
    folders = [one for one in env.get("PATH", system.DEFAULT_PATH).split(":") if one]
    return [(os.path.join(folder, name), *rest) for folder in folders], None, name


async def _attach(
    context: Context, wish: ops.Attach, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Attach."""
    entry = context.table.find(wish.pid, wish.tag)
    if wish.offset is not None and not 0 <= wish.offset <= entry.ring.end:
        raise RefusedError(
            f"cannot follow the process {entry.started.pid} from byte {wish.offset}: it has "
            f"printed {entry.ring.end}"
        )
    with entry.followed(wish.offset) as follower:
        lost = 0 if wish.offset is None else follower.offset - wish.offset
        await answer(connection, ops.Attached(entry.started.pid, follower.offset, lost))
        await tell(entry, follower, connection, hear_input(entry, connection, decoder))


async def tell(
    entry: Entry,
    follower: Follower,
    connection: socket.socket,
    hearing: Coroutine[object, object, bool],
) -> bool:
    """Send the output and the end of a process. Meanwhile `hearing` serves the other direction, and
    returns when that has ended: then stop sending.

    Return False if the host has disconnected before the end.
    """
    loop = asyncio.get_running_loop()
    telling = asyncio.current_task()
    assert telling is not None
    heard, is_reported = loop.create_task(hearing), False

    def is_deaf(done: "asyncio.Task[bool]") -> None:
        if not is_reported and not done.cancelled():
            telling.cancel()

    heard.add_done_callback(is_deaf)
    try:
        async for channel, data in follower.pieces():
            await loop.sock_sendall(connection, wire.encode_frame(channel, data))
        end = json.dumps(encode(entry.end)).encode()
        await loop.sock_sendall(connection, wire.encode_frame(wire.Channel.EXIT, end))
    except asyncio.CancelledError:
        if not heard.done():
            raise
        telling.uncancel()
        return not heard.result()
    except (BrokenPipeError, ConnectionResetError):
        return heard.done() and not heard.result()
    finally:
        is_reported = True
        heard.cancel()
        # It watches the connection; the next operation on it must be the only one that does.
        await asyncio.wait([heard])
    return True


async def hear_input(entry: Entry, connection: socket.socket, decoder: wire.Decoder) -> bool:
    """Write what arrives to the process's input, until the connection ends. Return True if the host
    has closed it, False if it was reset because the machine was suspended."""
    try:
        while True:
            while (frame := decoder.take_frame()) is None:
                decoder.feed(await receive(connection))
            if frame.channel is wire.Channel.STDIN:
                try:
                    await entry.feed(frame.payload, closes=not frame.payload)
                except ConflictingError:
                    continue  # its input is closed, but its output continues
    except ConnectionAbortedError:
        return False
    except (OSError, wire.WireError):
        return True


async def hear_end(entry: Entry, connection: socket.socket, decoder: wire.Decoder) -> bool:
    """Wait until the connection ends, and read nothing: the host's next request stays where it is.
    See `hear_input`."""
    del entry, decoder
    try:
        while True:
            await processes.readable(connection.fileno())
            if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return True
            await asyncio.sleep(_PEEK_S)  # it should have waited for the answer
    except ConnectionAbortedError:
        return False
    except OSError:
        return True


def _listed(context: Context, wish: ops.List) -> ops.Programs:
    """See core.ops.List."""
    if wish.pid is not None or wish.tag is not None:
        return ops.Programs((context.table.find(wish.pid, wish.tag).program(),))
    every = context.table.programs()
    kept, size = [], 0
    for one in reversed(every):  # the newest, if not all of them fit
        size += len(json.dumps(encode(one)))
        if size > _LIST_MAX:
            break
        kept.append(one)
    return ops.Programs(tuple(reversed(kept)), is_cut=len(kept) < len(every))


def _send_signal(context: Context, wish: ops.Signal) -> ops.Started:
    """See core.ops.Signal."""
    entry = context.table.find(wish.pid, wish.tag)
    if wish.forgets_tag:
        entry.forget_tag()
    entry.signal(wish.number, everything=wish.everything)
    return ops.Started(entry.started.pid)


async def _pour(
    context: Context, wish: ops.Feed, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Feed."""
    entry = context.table.find(wish.pid, wish.tag)
    entry.expect_much()
    await answer(connection, ops.Fed(entry.fed))
    takes, is_closed, trouble, taken = True, False, None, 0
    waiting, is_over = b"", False
    while not is_over:
        while (frame := decoder.take_frame()) is None:
            decoder.feed(await receive(connection))
        is_over = not frame.payload
        if takes and (waiting or is_over):
            # The last piece is known as such only when the stream has ended.
            closes = is_over and wish.closes
            at = None if wish.offset is None else wish.offset + taken
            try:
                count, is_closed = await entry.feed(
                    waiting, closes=closes, limit_s=_INPUT_LIMIT_S, at=at
                )
                taken += count
                takes = count == len(waiting)
            except ConflictingError as error:
                takes, trouble = False, str(error)
        waiting = frame.payload
    end = ops.FeedEnd(taken, is_closed, trouble)
    payload = json.dumps(encode(end)).encode()
    data = wire.encode_frame(wire.Channel.EXIT, payload)
    await asyncio.get_running_loop().sock_sendall(connection, data)


async def _feed(context: Context, wish: ops.Input) -> ops.Written:
    """See core.ops.Input."""
    entry = context.table.find(wish.pid, wish.tag)
    return ops.Written(*await entry.feed(wish.data, closes=wish.closes, limit_s=_INPUT_LIMIT_S))
