"""Starts a template's own command: the program that a user's template has running.

    /usr/lib/sandyard/command.json in the user's root: {"argv"|"shell", "env", "user", "workdir"}

PID 1 runs it through `run-command`, which starts it again when it fails. It becomes the program.
"""

import json
import os
import sys
from pathlib import Path

from sandyard.server.guest import system
from sandyard.server.guest.context import SHELLS, shell_programs

_FILE = "usr/lib/sandyard/command.json"
_CANNOT = 70


def main() -> int:
    """Become the program; return an exit code if that is impossible."""
    root = system.open_root()
    try:
        spec = json.loads((Path("/proc/1/root") / _FILE).read_text())
        account = system.find_account(root, spec["user"] or "root")
        env = system.plain_environment(account) | spec["env"]
        system.enter(root)
        os.setgroups(account.groups)
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
        folder = str(spec["workdir"] or "/")
        if folder == "~" or folder.startswith("~/"):
            folder = account.home + folder[1:]
        try:
            os.chdir(folder)
        except OSError as error:
            sys.stderr.write(f"sandyard: cannot enter {folder}: {error.strerror}\n")
            os.chdir("/")
        return _become(spec, env)
    except (OSError, ValueError, KeyError, TypeError, system.RefusedError) as error:
        sys.stderr.write(f"sandyard: cannot start the template's command: {error}\n")
        return _CANNOT


def _become(spec: dict[str, object], env: dict[str, str]) -> int:
    shell, argv = spec.get("shell"), spec.get("argv")
    if isinstance(shell, str):
        programs = shell_programs(SHELLS, "-c", shell)
    elif isinstance(argv, list) and argv:
        name, *rest = (str(one) for one in argv)
        folders = [""] if "/" in name else env.get("PATH", system.DEFAULT_PATH).split(":")
        programs = [(os.path.join(folder, name), *rest) for folder in folders]
    else:
        raise ValueError("it has no program")
    for program in programs:
        try:
            os.execve(program[0], program, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise ValueError(f"{programs[0][0]} is not there")


if __name__ == "__main__":
    sys.exit(main())
