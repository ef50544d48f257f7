"""What the command line prints: for people on a terminal, for programs in a pipe.

Names, messages and the like are untrusted text: it is never taken for markup, and what would
move a terminal's cursor is shown as an escape.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from sandyard.client import ApiError, ConnectionFailedError, SandyardError

out = Console(highlight=False, markup=False, soft_wrap=True)
_wanted: set[str] = set()


def _note_json(wanted: bool) -> bool:
    if wanted:
        _wanted.add("json")
    return wanted


Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=_note_json, help="Print JSON; an error too, on standard error."
    ),
]
"""The option of commands that print JSON when asked."""


def plain(text: str) -> str:
    """Return text with every control character, but for line ends and tabs, as an escape."""
    return "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode()
        for one in text
    )


@contextmanager
def _until_seen_enough() -> Iterator[None]:
    """End this command successfully when the reader of its output closes the pipe."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; in a pipe, a line a row with tabs between, and nothing cut off.

    On a terminal that is too narrow for a line a row, print a line a cell.
    """
    shown = [[plain(cell).replace("\t", " ").replace("\n", " ") for cell in row] for row in rows]
    if not sys.stdout.isatty():
        with _until_seen_enough():
            for row in (columns, *shown):
                typer.echo("\t".join(row))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *shown, strict=True)]
    if sum(widths) + 2 * len(widths) > console.width and shown:
        show_records(columns, shown)
        return
    table = Table(box=None)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in shown:
        table.add_row(*row)
    console.print(table)


def show_records(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as lines of a name and a value, without those that are empty; in a pipe with a
    tab between."""
    width = max(map(cell_len, columns)) if sys.stdout.isatty() else 0
    between = "  " if width else "\t"
    with _until_seen_enough():
        for number, row in enumerate(rows):
            if number:
                typer.echo()
            for column, cell in zip(columns, row, strict=True):
                if cell:
                    typer.echo(plain(f"{column:<{width}}") + between + plain(cell))


def show_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print JSON: one object, or a list of them."""
    with _until_seen_enough():
        is_for_people = sys.stdout.isatty()
        text = json.dumps(value, indent=2, ensure_ascii=not is_for_people)
        typer.echo("".join(_escaped(one) for one in text) if is_for_people else text)


def _escaped(character: str) -> str:
    """Escape a character so that a terminal shows it instead of interpreting it."""
    if character.isprintable() or character == "\n":
        return character
    return json.dumps(character)[1:-1]


def note_copy(copy: Path | None) -> None:
    """Warn that the saved server or key was replaced, and say where the old one is."""
    if copy is not None:
        warn(
            f"this replaced the saved server and key, which are kept in {copy}; use --profile NAME "
            "to have several"
        )


def warn(message: str) -> None:
    """Print a warning on standard error."""
    typer.echo(f"warning: {plain(message)}", err=True)


def for_each(
    references: Sequence[str], work: Callable[[str], str], *, as_json: bool = False
) -> None:
    """Apply a function to each, and continue after failures. Exit with code 1 at the end if any
    failed."""
    results: list[dict[str, Any]] = []
    try:
        for reference in references:
            try:
                text = work(reference)
                results.append({"reference": reference, "ok": True})
                if not as_json:
                    typer.echo(plain(text))
            except ApiError as error:
                results.append({"reference": reference, "ok": False, "error": _fields_of(error)})
                if not as_json:
                    _show_error(_sentence(error))
    finally:
        if as_json:
            # A closed pipe ends nothing here: failures still decide the exit code.
            with suppress(typer.Exit):
                show_json(results)
    if not all(one["ok"] for one in results):
        raise typer.Exit(1)


def show_failure(error: Exception, hint: str = "") -> None:
    """Print on standard error why a command failed: a sentence, or an object with `--json`."""
    if "json" in _wanted:
        typer.echo(json.dumps({"error": _fields_of(error, hint)}), err=True)
    else:
        _show_error(_sentence(error) + hint)


def _sentence(error: Exception) -> str:
    if isinstance(error, ApiError):
        return f"{error.message} [{error.code}, {error.request_id}]"
    if isinstance(error, OSError) and error.filename:  # a file of this computer
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fields_of(error: Exception, hint: str = "") -> dict[str, Any]:
    match error:
        case ApiError():
            return {
                "code": error.code,
                "message": error.message + hint,
                "requestId": error.request_id,
            }
        case ConnectionFailedError():
            code = "connection_failed"
        case SandyardError():
            code = "failed"
        case _:
            code = "local_error"
    return {"code": code, "message": _sentence(error) + hint}


def _show_error(message: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("error:", style="red", end=" ")
    console.print(plain(message), markup=False)


def write_raw(stream: Any, data: bytes, *, raw: bool) -> None:
    """Write what a command printed: its very bytes, but for a terminal that did not ask for them.

    What a hostile program prints could otherwise retitle, clear or answer for a terminal.
    """
    with _until_seen_enough():
        if raw or not stream.isatty():
            stream.buffer.write(data)
        else:
            stream.write(plain(data.decode(errors="replace").replace("\r\n", "\n")))
        stream.flush()
