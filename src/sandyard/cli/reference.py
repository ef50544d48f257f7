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

This page is generated from the commands; `sandyard --help` and `sandyard COMMAND --help` show the
same text. A sandbox is given by id or name. Commands that take several references try each one,
even if another fails.

The URL and API key come from SANDYARD_URL and SANDYARD_API_KEY, or from
`~/.config/sandyard/config.toml`, which `sandyard login` and `scripts/up` write. `--profile NAME`,
or SANDYARD_PROFILE, saves and uses several servers there, each in a section `[profiles.NAME]`. User
commands need only the package. Operator commands (`serve`, `init`, `stop`, `doctor`, `setup`,
`admin`, `template`) need its extra `server`, which `scripts/up` installs, and root, except `init`.
They read the [settings](settings.md).

On a terminal, lists are tables. In a pipe, each row is a line with tabs, and nothing is truncated.
`--json` prints one object, or an array for a list. `NO_COLOR` is respected. Output of a sandbox is
passed on byte by byte; on a terminal, control characters are escaped unless you use `--raw` or
`-t`. `sandyard --version` prints the version, with a hash of the code. `sandyard
--install-completion` enables completion of commands and sandbox names in your shell;
`--show-completion` prints what it would install.

| Exit code | Meaning |
|---|---|
| 0 | success |
| 1 | failure; one sentence on standard error says why |
| 2 | invalid command line |
| 74 | `exec` and `run`: the command succeeded, but some of its output was lost |
| 130 | Ctrl-C |
| any other | `exec` and `run`: the exit code of the command |
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
    rows += [(_option(one), _cell(one)) for one in options]
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


def _cell(option: Any) -> str:
    text = option.help or ""
    if option.default not in (None, False, [], ()) and not callable(option.default):
        shown = f"{option.default:g}" if isinstance(option.default, float) else option.default
        text += f" Default: {shown}."
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
