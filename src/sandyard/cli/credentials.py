"""How commands are given secrets: by a file or standard input, which no other user can see."""

import sys
from pathlib import Path

import typer

_STDIN = Path("-")
_MAX = 64 * 1024


def secret_of(given: str | None, file: Path | None, *, what: str, option: str) -> str:
    """Return a secret from where the user put it.

    `given` is from the command line and prints a warning: any user of the host can see it there.
    Without it and a file, a terminal is asked and a pipe is read. `option` names the one for files.

    Raises:
        typer.BadParameter: it is given twice, the file cannot be read, or there is none.
    """
    if given is not None and file is not None:
        raise typer.BadParameter(f"give the {what} once: by {option}, or as an argument")
    if given is not None:
        typer.echo(
            f"warning: on a command line, the {what} is visible in the list of processes; use "
            f"{option} FILE, or a pipe (a later version will not take it)",
            err=True,
        )
        found = given
    elif file is not None and file != _STDIN:
        try:
            with file.open() as opened:
                found = opened.read(_MAX)
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"cannot read the {what} from {file}: {error}") from error
    elif sys.stdin.isatty() and file is None:
        found = typer.prompt(what, hide_input=True)
    else:
        found = sys.stdin.readline(_MAX)
    if not found.strip():
        raise typer.BadParameter(f"there is no {what}: it is empty")
    return found.strip()
