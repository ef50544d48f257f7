"""`sandyard cp` and `sandyard run`: files in and out, and one command in a sandbox of its own."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

from sandyard.cli.output import write_raw
from sandyard.cli.sandbox import open_client
from sandyard.cli.terminal import CUT, leave
from sandyard.client import (
    ApiError,
    Exited,
    Lost,
    NotFoundError,
    Printed,
    Process,
    Sandbox,
    Sandyard,
    WorkspaceFiles,
)
from sandyard.client.archives import Progress as Told
from sandyard.client.calls import milliseconds

_LANGUAGES = {".py": "python3", ".js": "node", ".mjs": "node", ".sh": "bash"}
_WORKSPACE = PurePosixPath("/workspace")
_AT = "@"  # no sandbox's name begins so


def copy(
    source: Annotated[str, typer.Argument(help="A local path, SANDBOX:PATH, or @WORKSPACE:PATH.")],
    target: Annotated[str, typer.Argument(help="A local path, SANDBOX:PATH, or @WORKSPACE:PATH.")],
    user: Annotated[str, typer.Option(help="The user in the sandbox.")] = "root",
) -> None:
    """Copy a file or directory to or from a sandbox or workspace.

    Like cp: a copy into an existing directory keeps its name, and `FOLDER/.` copies the directory's
    contents.
    """
    here, there = _remote(source), _remote(target)
    if (here is None) == (there is None):
        raise typer.BadParameter(
            "one of the two is SANDBOX:PATH or @WORKSPACE:PATH, the other a path here"
        )
    with open_client() as client, _progress(source) as told:
        if there is not None:
            reference, path = there
            local = Path(source)
            if not local.exists():
                raise typer.BadParameter(f"there is no {source} here")
            is_contents = source.endswith("/.") and local.is_dir()
            # Under its own name, also where it is a link; of `.` and `..` that is the folder's.
            plain = local.name not in ("", "..")
            name = "" if is_contents else local.name if plain else local.resolve().name
            if reference.startswith(_AT):
                _put(client.workspace_files(reference[1:]), local, name, path, told)
                return
            files = client.files(reference, user=user)
            with suppress(ApiError):
                if name and (path.endswith("/") or files.info(path).is_folder):
                    path = f"{path.rstrip('/')}/{name}"
            files.upload(local, path, on_progress=told)
        else:
            assert here is not None
            reference, path = here
            to, name = Path(target), PurePosixPath(path).name
            if name == "..":
                raise typer.BadParameter(f"name what {path} is: it would be written beside {to}")
            is_contents = path.endswith("/.") or path == "."
            if not is_contents and (to.is_dir() or target.endswith("/")):
                to = to / name
                to.parent.mkdir(parents=True, exist_ok=True)
            if reference.startswith(_AT):
                client.workspace_files(reference[1:]).download(path, to, on_progress=told)
            else:
                client.files(reference, user=user).download(path, to, on_progress=told)


def _put(files: WorkspaceFiles, local: Path, name: str, path: str, told: Told) -> None:
    """Copy a file or folder into a workspace; what goes to a folder that is there, goes into it."""
    try:
        found = files.list(path)
        # A file is listed as itself alone.
        names = [one for one in path.split("/") if one]
        is_file = [one.path.split("/")[1:] for one in found] == [names]
    except NotFoundError:
        is_file = not path.endswith("/")
    files.upload(local, path if is_file else f"{path.rstrip('/')}/{name}", on_progress=told)


def _remote(text: str) -> tuple[str, str] | None:
    """Return sandbox and path of `name:path`; a path here has no colon before its first slash."""
    reference, colon, path = text.partition(":")
    if not colon or "/" in reference or not reference:
        return None
    if reference.startswith(_AT):
        return reference, path or "/"
    return reference, path or str(_WORKSPACE)


@contextmanager
def _progress(what: str) -> Iterator[Told]:
    """Show on a terminal how much has gone by."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn())
    console = Console(stderr=True, markup=False)
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(Path(what).name or what, total=None)
        yield lambda count: bar.advance(task, count)


def run(
    command: Annotated[
        list[str],
        typer.Argument(help="A local script and its arguments, or a shell command."),
    ],
    template: Annotated[
        str | None, typer.Option(help="The template. Default: base-ubuntu.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="The time limit in seconds.")] = 3600.0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the sandbox afterwards.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print control characters to the terminal unchanged.")
    ] = False,
) -> None:
    """Run a command or script in a temporary sandbox, which is deleted afterwards.

    Output is streamed, and the exit code becomes this command's. A local script (.py, .js, .sh, or
    any file with a #! line) is copied into the sandbox first.
    """
    command = command[1:] if command[0] == "--" else command
    limit = milliseconds(timeout)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, say
            signal.signal(number, leave)
    with open_client() as client:
        if keep:
            sandbox = client.create(template)
            typer.echo(f"the sandbox is {sandbox.id}", err=True)
            code = _run_in(client, sandbox, command, limit, raw=raw)
        else:
            with Sandbox.create(template, client=client) as sandbox:
                code = _run_in(client, sandbox, command, limit, raw=raw)
    raise typer.Exit(code)


def _run_in(
    client: Sandyard, sandbox: Sandbox, command: list[str], limit_ms: int, *, raw: bool
) -> int:
    line = _line(client, sandbox.id, command)
    process = client.processes(sandbox.id).start(line, timeout=limit_ms)
    return _pass_on(process, raw=raw)


def _line(client: Sandyard, reference: str, command: list[str]) -> str | list[str]:
    """Return what to run, with a script that is here copied there."""
    script = Path(command[0])
    if not os.path.isfile(script):  # of a name that is too long, too
        return command[0] if len(command) == 1 else command
    there = str(_WORKSPACE / script.name)
    client.files(reference).upload(script, there)
    language = _LANGUAGES.get(script.suffix)
    if language is None:
        return f"chmod +x {shlex.quote(there)} && exec {shlex.join([there, *command[1:]])}"
    return [language, there, *command[1:]]


def _pass_on(process: Process, *, raw: bool) -> int:
    """Print what a process prints, and return its exit code."""
    code, lost = 0, 0
    for event in process.events():
        match event:
            case Printed(stream="stderr", data=data):
                write_raw(sys.stderr, data, raw=raw)
            case Printed(data=data):
                write_raw(sys.stdout, data, raw=raw)
            case Lost(count=count):
                lost += count
            case Exited(exit_code=exit_code, timed_out=timed_out):
                code = exit_code
                if timed_out:
                    typer.echo("the command was ended: its time was over", err=True)
    if lost:
        typer.echo(f"{lost} bytes of output were lost on their way", err=True)
    return code or (CUT if lost else 0)
