"""`sandyard cp` and `sandyard run`: files in and out, and one command in a sandbox of its own."""

import os
import shlex
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

from sandyard.cli.output import plain, write_raw
from sandyard.cli.sandbox import known_templates, open_client
from sandyard.cli.terminal import leaving, pass_input, run_to_end
from sandyard.client import (
    ApiError,
    Files,
    NotFoundError,
    OutsideLink,
    Sandbox,
    Sandyard,
    WorkspaceFiles,
    archives,
)
from sandyard.client.archives import Progress as OnProgress
from sandyard.client.calls import milliseconds

_LANGUAGES = {".py": "python3", ".js": "node", ".mjs": "node", ".sh": "bash"}
_WORKSPACE = PurePosixPath("/workspace")
_SHOWN_MAX = 10
_AT = "@"  # no sandbox's name begins so


def copy(
    source: Annotated[str, typer.Argument(help="A local path, SANDBOX:PATH, or @WORKSPACE:PATH.")],
    target: Annotated[str, typer.Argument(help="A local path, SANDBOX:PATH, or @WORKSPACE:PATH.")],
    user: Annotated[str, typer.Option(help="The user in the sandbox.")] = "root",
) -> None:
    """Copy a file or directory to or from a sandbox or workspace.

    Like cp: a copy into an existing directory keeps its name, and `FOLDER/.` copies the directory's
    contents. `-` is standard input or output: `sandyard cp NAME:/etc/hosts -`.
    """
    here, there = _remote(source), _remote(target)
    if "-" in (source, target):
        _copy_stream(here if target == "-" else there, user, is_output=target == "-")
        return
    if (here is None) == (there is None):
        raise typer.BadParameter(
            "one of the two is SANDBOX:PATH or @WORKSPACE:PATH, the other a path here"
        )
    with open_client() as client, _progress(source) as progress:
        if there is not None:
            reference, path = there
            local = Path(source)
            if not local.exists():
                raise typer.BadParameter(f"there is no {source} here")
            is_contents = source.endswith("/.") and local.is_dir()
            # Under its own name, also where it is a link; of `.` and `..` that is the folder's.
            is_name = local.name not in ("", "..")
            name = "" if is_contents else local.name if is_name else local.resolve().name
            if reference.startswith(_AT):
                _put(client.workspace_files(reference[1:]), local, name, path, progress)
                return
            files = client.files(reference, user=user)
            with suppress(ApiError):
                if name and (path.endswith("/") or files.info(path).is_folder):
                    path = f"{path.rstrip('/')}/{name}"
            files.upload(local, path, on_progress=progress)
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
                client.workspace_files(reference[1:]).download(path, to, on_progress=progress)
            else:
                left = client.files(reference, user=user).download(path, to, on_progress=progress)
                _tell_of(left)


def _copy_stream(remote: tuple[str, str] | None, user: str, *, is_output: bool) -> None:
    """Copy a file to standard output, or standard input to a file."""
    if remote is None:
        raise typer.BadParameter("the other one is SANDBOX:PATH or @WORKSPACE:PATH")
    reference, path = remote
    with open_client() as client:
        if reference.startswith(_AT):
            files: Files | WorkspaceFiles = client.workspace_files(reference[1:])
        else:
            files = client.files(reference, user=user)
        if is_output:
            for piece in files.read_pieces(path):
                write_raw(sys.stdout, piece, raw=True)
        elif path.endswith("/"):
            raise typer.BadParameter(f"{path} is a directory: name the file in it")
        else:
            files.write(path, archives.pieces_of(sys.stdin.buffer))


def _tell_of(links: Sequence[OutsideLink]) -> None:
    """Say which links lead out of what was copied."""
    for one in links[:_SHOWN_MAX]:
        typer.echo(plain(f"note: the link {one.path} leads out of it, to {one.target}"), err=True)
    if len(links) > _SHOWN_MAX:
        typer.echo(f"note: so do {len(links) - _SHOWN_MAX} other links", err=True)


def _put(files: WorkspaceFiles, local: Path, name: str, path: str, progress: OnProgress) -> None:
    """Copy a file or folder into a workspace; what goes to a folder that is there, goes into it."""
    try:
        found = files.list(path)
        # A file is listed as itself alone.
        names = [one for one in path.split("/") if one]
        is_file = [one.path.split("/")[1:] for one in found] == [names]
    except NotFoundError:
        is_file = not path.endswith("/")
    files.upload(local, path if is_file else f"{path.rstrip('/')}/{name}", on_progress=progress)


def _remote(text: str) -> tuple[str, str] | None:
    """Return sandbox and path of `name:path`; a path here has no colon before its first slash."""
    reference, colon, path = text.partition(":")
    if not colon or "/" in reference or not reference:
        return None
    if reference.startswith(_AT):
        return reference, path or "/"
    return reference, path or str(_WORKSPACE)


@contextmanager
def _progress(what: str) -> Iterator[OnProgress]:
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
        str | None,
        typer.Option(help="The template. Default: base-ubuntu.", autocompletion=known_templates),
    ] = None,
    timeout: Annotated[float, typer.Option(help="The time limit in seconds.")] = 3600.0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the sandbox afterwards.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print control characters to the terminal unchanged.")
    ] = False,
) -> None:
    """Run a command or script in a temporary sandbox, which is deleted afterwards.

    Output is streamed, and the exit code becomes this command's. A local script (.py, .js, .sh, or
    any file with a #! line) is copied into the sandbox first. Standard input is passed on if it is
    a pipe or a file.
    """
    command = command[1:] if command[0] == "--" else command
    limit = milliseconds(timeout)
    _check(command)
    with leaving(), open_client() as client:
        if keep:
            sandbox = client.create(template)
            typer.echo(f"the sandbox is {sandbox.id}", err=True)
            code = _run_in(client, sandbox, command, limit, raw=raw)
        else:
            with Sandbox.create(template, client=client) as sandbox:
                code = _run_in(client, sandbox, command, limit, raw=raw)
    raise typer.Exit(code)


def _check(command: list[str]) -> None:
    """Refuse a script that is not here, or that nothing is known to run."""
    script = Path(command[0])
    if not os.path.isfile(script):
        if script.suffix in _LANGUAGES and len(command[0].split()) == 1:
            raise typer.BadParameter(f"there is no {command[0]} here")
        return
    if script.suffix not in _LANGUAGES:
        with script.open("rb") as file:
            is_script = file.read(2) == b"#!"
        if not is_script and not os.access(script, os.X_OK):
            raise typer.BadParameter(
                f"cannot tell what runs {command[0]}: begin it with a line such as "
                f"#!/usr/bin/env ruby"
            )


def _run_in(
    client: Sandyard, sandbox: Sandbox, command: list[str], limit_ms: int, *, raw: bool
) -> int:
    line = _line(client, sandbox.id, command)
    has_input = _has_input()
    process = client.processes(sandbox.id).start(line, timeout=limit_ms, stdin=has_input)
    if has_input:
        passing = threading.Thread(target=pass_input, args=(process,), daemon=True)
        passing.start()
    return run_to_end(process, raw=raw)


def _has_input() -> bool:
    """Tell whether this command's standard input is a pipe, a file or a socket."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


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
