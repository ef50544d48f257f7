"""Makes the reference page of the command line, out of the commands themselves.

`python -m sandyard.cli.reference` writes it; a test compares.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from sandyard.cli.main import app

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "cli.md"
_HEAD = """# Command line

This page is made from the commands; `sandyard --help` and `sandyard COMMAND --help` tell the same.
A sandbox is meant by its id or its name. Of several references each is tried, whatever becomes of
the others.

URL and key come from SANDYARD_URL and SANDYARD_API_KEY, or else from
`~/.config/sandyard/config.toml`, which `sandyard login` and `scripts/up` write. Commands for users
need the package alone; those for the operator (`serve`, `init`, `stop`, `doctor`, `setup`, `admin`,
`template`) need its extra `server`, which `scripts/up` installs, and all but `init` need root. They
read the [settings](settings.md).

On a terminal, lists are tables; in a pipe, a line is a row with tabs between, and nothing is cut
off. `--json` prints one object, or for a list an array. `NO_COLOR` is respected. What a sandbox
prints is passed on byte by byte; on a terminal its control characters are shown as escapes, unless
you ask for `--raw`, or for a terminal of its own with `-t`. `sandyard --version` prints the
version. `sandyard --install-completion` has your shell complete commands and the names of
sandboxes, and `--show-completion` prints what it would install.

| Exit code | Means |
|---|---|
| 0 | it is done |
| 1 | it could not be done; one sentence on standard error says why |
| 2 | the command is written wrongly |
| 74 | `exec` and `run`: some of the output was lost, though the command itself did well |
| 130 | Ctrl-C |
| any other | `exec` and `run`: that of the command |
"""


def page() -> str:
    """Return the page."""
    root = typer.main.get_command(app)
    parts = [_HEAD]
    for path, command in _commands(root, "sandyard"):
        parts.append(_section(path, command))
    return "\n".join(parts)


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command that is shown, those of a group after one another."""
    for name, command in sorted(
        group.commands.items(), key=lambda one: hasattr(one[1], "commands")
    ):
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _section(path: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [
        one
        for one in command.params
        if one.param_type_name == "option" and not one.hidden and one.name != "help"
    ]
    usage = " ".join([path, *(_argument(one) for one in arguments)])
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.help or "")).strip()
    lines = [f"## `{usage}`", "", text, ""]
    rows = [(f"`{_argument(one)}`", one.help) for one in arguments if one.help]
    rows += [(_option(one), _told(one)) for one in options]
    if rows:
        lines += ["| | |", "|---|---|", *(f"| {name} | {what} |" for name, what in rows), ""]
    return "\n".join(lines)


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper().rstrip("…")
    shown = f"{name}…" if argument.nargs == -1 else name
    return shown if argument.required else f"[{shown}]"


def _option(option: Any) -> str:
    names = ", ".join(f"`{one}`" for one in sorted(option.opts, key=len))
    return names if option.is_flag else f"{names} `{option.metavar or option.name.upper()}`"


def _told(option: Any) -> str:
    told = option.help or ""
    if option.default not in (None, False, [], ()) and not callable(option.default):
        shown = f"{option.default:g}" if isinstance(option.default, float) else option.default
        told += f" Default: {shown}."
    return told


if __name__ == "__main__":
    PAGE.write_text(page())
