"""Runs a command in a sandbox attached to the local terminal, or to local input and output."""

import os
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from sandyard.cli.output import write_raw
from sandyard.client import Exited, Lost, Printed, Process, Sandyard, SandyardError, TransferError
from sandyard.client.calls import SHELL, milliseconds
from sandyard.client.options import ProcessOptions

if TYPE_CHECKING:
    from sandyard.client.attach import Attachment

_READ = 16 * 1024
CUT = 74  # EX_IOERR of sysexits.h


def run_attached(
    client: Sandyard,
    reference: str,
    command: Sequence[str],
    *,
    has_terminal: bool,
    has_input: bool,
    cwd: str | None,
    user: str | None,
    timeout_s: float | None,
    raw: bool,
) -> int:
    """Run a command to its end, and return its exit code.

    With `has_terminal` it runs on a terminal of the local one's size, which gets all keys, Ctrl-C
    too. With `has_input` it gets the local standard input.
    """
    # With its library for WebSockets, which no other command needs.
    from sandyard.client.attach import Attachment

    options = _options(
        has_terminal=has_terminal, has_input=has_input, cwd=cwd, user=user, timeout_s=timeout_s
    )
    line = command[0] if len(command) == 1 else list(command) or SHELL
    process = client.processes(reference).start(line, **options)
    code: int | None = None
    lost, is_reported = 0, False
    try:
        with (
            Attachment(client.config, process.path, exact=not has_terminal) as attached,
            _passed_on(attached, has_terminal=has_terminal),
        ):
            if has_input or has_terminal:
                _beside(_pass_on, attached)
            for event in attached.events():
                match event:
                    case Printed(stream=stream, data=data):
                        out = sys.stderr if stream == "stderr" else sys.stdout
                        write_raw(out, data, raw=raw or has_terminal)
                    case Lost(count=count):
                        lost += count
                    case Exited():
                        code = event.exit_code
                        if event.timed_out:
                            typer.echo("the command was ended: its time was over", err=True)
    except SandyardError as error:
        # Paused, say, or deleted: ending the process would resume the sandbox.
        is_reported = not isinstance(error, TransferError)
        raise
    finally:
        if code is None and not is_reported:  # nothing else would end it
            with suppress(SandyardError):
                process.signal("SIGKILL", everything=True)
    if lost:
        typer.echo(f"{lost} bytes of output were lost on their way", err=True)
    return code or (CUT if lost else 0)


def run_to_end(process: Process, *, raw: bool) -> int:
    """Print what a process prints as it comes, and return its exit code. The process is ended if
    this is interrupted, or the reader of the output has seen enough."""
    code: int | None = None
    lost, is_reported = 0, False
    try:
        for event in process.events():
            match event:
                case Printed(stream=stream, data=data):
                    write_raw(sys.stderr if stream == "stderr" else sys.stdout, data, raw=raw)
                case Lost(count=count):
                    lost += count
                case Exited():
                    code = event.exit_code
                    if event.timed_out:
                        typer.echo("the command was ended: its time was over", err=True)
    except SandyardError:
        # Paused, say, or deleted: ending the process would resume the sandbox.
        is_reported = True
        raise
    finally:
        if code is None and not is_reported:
            with suppress(SandyardError):
                process.signal("SIGKILL", everything=True)
    if lost:
        typer.echo(f"{lost} bytes of output were lost on their way", err=True)
    return code or (CUT if lost else 0)


def show_output(process: Process, *, follow: bool, raw: bool) -> None:
    """Print what is kept of a process's output, and with `follow` what comes until it ends."""
    left = process.info().raw["outputBytes"]
    events = process.events()
    while left > 0 or follow:
        match next(events, None):
            case Printed(stream=stream, data=data):
                write_raw(sys.stderr if stream == "stderr" else sys.stdout, data, raw=raw)
                left -= len(data)
            case Lost(count=count):
                typer.echo(f"{count} bytes are no longer kept", err=True)
                left -= count
            case Exited() | None:
                return


def pass_input(process: Process) -> None:
    """Pass on this command's input to a process, and its end."""
    with suppress(SandyardError):  # a process that has ended takes no more
        try:
            while data := os.read(0, _READ):
                process.write(data)
        except OSError:
            pass  # there is none
        process.close_stdin()


@contextmanager
def leaving() -> Iterator[None]:
    """During the block, exit in an orderly way on a signal to end."""
    kept = {
        number: signal.signal(number, leave)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # under nohup, say
    }
    try:
        yield
    finally:
        for number, earlier in kept.items():
            signal.signal(number, earlier)


def _options(
    *,
    has_terminal: bool,
    has_input: bool,
    cwd: str | None,
    user: str | None,
    timeout_s: float | None,
) -> ProcessOptions:
    """Return the options for starting the command."""
    options: ProcessOptions = {"cwd": cwd, "user": user, "stdin": has_input or has_terminal}
    if has_terminal:
        size = _size()
        options["pty"] = {"cols": size.columns, "rows": size.lines}
        options["env"] = {"TERM": os.environ.get("TERM", "xterm-256color")}
    if timeout_s is not None:
        options["timeout"] = milliseconds(timeout_s)
    return options


def _size() -> os.terminal_size:
    """Return the terminal's size: what COLUMNS and LINES say does not change with the window."""
    try:
        return os.get_terminal_size(0)
    except OSError:
        return shutil.get_terminal_size()


def _pass_on(attached: "Attachment") -> None:
    """Pass on this command's input, and its end."""
    with suppress(SandyardError):
        try:
            while data := os.read(0, _READ):
                attached.write(data)
        except OSError:
            pass  # there is none
        attached.end()


def _beside(work: Callable[..., object], *arguments: object) -> None:
    """Run a function in a daemon thread, which does not delay the end of the program. Signal
    handlers use it: the interrupted code may hold the locks that sending needs."""
    threading.Thread(target=work, args=arguments, daemon=True).start()


def leave(number: int, _: object) -> None:
    """Exit because of a signal, after restoring the terminal."""
    sys.exit(128 + number)


@contextmanager
def _passed_on(attached: "Attachment", *, has_terminal: bool) -> Iterator[None]:
    """While the block lasts, pass on what happens here: on a terminal every key, as it is, and its
    size; without one Ctrl-C, whose second time ends this command."""

    def resize(*_: object) -> None:
        _beside(_resize, attached)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _beside(_interrupt, attached)

    number, handler = (signal.SIGWINCH, resize) if has_terminal else (signal.SIGINT, interrupt)
    handlers: dict[int, Callable[[int, object], object]] = {
        signal.SIGTERM: leave,
        signal.SIGHUP: leave,
        number: handler,
    }
    before = {
        one: signal.signal(one, handler)
        for one, handler in handlers.items()
        if signal.getsignal(one) is not signal.SIG_IGN  # under nohup, say
    }
    try:
        kept = termios.tcgetattr(0) if has_terminal else None
        try:
            if has_terminal:
                tty.setraw(0, termios.TCSADRAIN)  # what is typed by now is for the program
            yield
        finally:
            if kept is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, kept)
    finally:
        for one, earlier in before.items():
            signal.signal(one, earlier)


def _resize(attached: "Attachment") -> None:
    size = _size()
    with suppress(SandyardError):
        attached.resize(size.columns, size.lines)


def _interrupt(attached: "Attachment") -> None:
    with suppress(SandyardError):
        attached.signal("SIGINT")
