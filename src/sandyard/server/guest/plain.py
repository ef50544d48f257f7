"""Command lines for which a shell would do nothing but start one program.

Under emulation, bash takes longer to start than most programs. A line of plain words means the same
without it, so its program can be started directly, in the environment that bash would give it.
Anything that might mean more is left to bash, and so are the messages if the program cannot be
started.
"""

import os
import re
from collections.abc import Mapping, Sequence

# bash uses two control characters itself; lines with them are left to it.
_WORD = re.compile(r"""(?:[A-Za-z0-9_@%+:,./=-]+|'[^'\0\x01\x7f]*'|"[^"$`\\\0\x01\x7f]*")+""")
_NAME = re.compile(r"[A-Za-z0-9_./+-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANKS = re.compile(r"[ \t]+")
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
# Of bash 5.3: its keywords and builtins.
_SHELLS_OWN = frozenset(
    (
        *("if", "then", "else", "elif", "fi", "case", "esac", "for", "select", "while", "until"),
        *("do", "done", "in", "function", "time", "coproc", ".", "alias", "bg", "bind", "break"),
        *("builtin", "caller", "cd", "command", "compgen", "complete", "compopt", "continue"),
        *("declare", "dirs", "disown", "echo", "enable", "eval", "exec", "exit", "export", "fc"),
        *("fg", "getopts", "hash", "help", "history", "jobs", "kill", "let", "local", "logout"),
        *("mapfile", "popd", "printf", "pushd", "pwd", "read", "readarray", "readonly", "return"),
        *("set", "shift", "shopt", "source", "suspend", "test", "times", "trap", "type", "typeset"),
        *("ulimit", "umask", "unalias", "unset", "wait"),
    )
)
# Builtins that do the same as the programs of that name, without arguments.
_PROGRAMS_TOO = {
    name: tuple(f"{folder}/{name}" for folder in ("/usr/bin", "/bin")) for name in ("true", "false")
}
# Variables that bash sets, unsets or uses: bash(1), "Shell Variables".
_BASHS = frozenset(
    (
        *("_", "DIRSTACK", "EUID", "EXECIGNORE", "FUNCNAME", "GROUPS", "IFS", "LINENO", "OLDPWD"),
        *("OPTARG", "OPTERR", "OPTIND", "PIPESTATUS", "POSIXLY_CORRECT", "PPID", "PS0", "PS1"),
        *("PS2", "PS3", "PS4", "PWD", "RANDOM", "SECONDS", "SHELLOPTS", "SHLVL", "SRANDOM", "UID"),
        *("SSH_CLIENT", "SSH2_CLIENT"),  # Debian's takes itself for sshd's then
    )
)
_BASHS_TOO = ("BASH", "COMP_", "EPOCH", "HIST", "LC_", "READLINE_")
_BASH = ("/bin/bash", "/usr/bin/bash")


def words_of(line: str) -> list[str] | None:
    """Return the words of a command line that is one program and its arguments, or None if it might
    be anything else."""
    words = []
    at = 0
    line = line.strip(" \t")
    while at < len(line):
        if (word := _WORD.match(line, at)) is None:
            return None
        words.append(_QUOTED.sub(lambda one: one[1] or one[2] or "", word[0]))
        at = word.end()
        if at < len(line):
            if (blanks := _BLANKS.match(line, at)) is None:
                return None
            at = blanks.end()
    name = line[: len(words[0])] if words else ""
    if not words or _NAME.fullmatch(name) is None or name in _SHELLS_OWN:
        return None
    if words[0] != name or (name in _PROGRAMS_TOO and len(words) > 1):
        return None
    return words


def is_plain(env: Mapping[str, str]) -> bool:
    """Tell whether bash would pass on an environment unchanged, and look programs up in PATH."""
    return all(
        _VARIABLE.fullmatch(name) is not None
        and name not in _BASHS
        and not name.startswith(_BASHS_TOO)
        for name in env
    ) and all(
        folder.startswith("/") and not folder.endswith("/")
        for folder in env.get("PATH", "").split(":")
    )


def program_of(words: Sequence[str], env: Mapping[str, str]) -> tuple[str, dict[str, str]] | None:
    """Return the program that bash would start, and the environment it would get; None if there is
    no bash, or if that is not certain."""
    if not any(os.access(shell, os.X_OK) for shell in _BASH):
        return None
    name = words[0]
    if "/" in name:
        candidates = [name]
    elif name in _PROGRAMS_TOO:
        candidates = [*_PROGRAMS_TOO[name]]
    else:
        candidates = [f"{folder}/{name}" for folder in env["PATH"].split(":")]
    for path in candidates:
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            try:
                folder = os.getcwd()
            except OSError:  # it no longer exists: bash reports that
                return None
            return path, {**env, "PWD": folder, "SHLVL": "0", "_": path}
    return None
