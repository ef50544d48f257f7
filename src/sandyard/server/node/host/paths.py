"""Checks whether the accounts of hypervisors can reach the installation's files.

A machine's process runs under its own account and opens its image, disk and sockets by path. If a
parent folder is not accessible to that account, no machine can start. The server therefore checks
this when it starts, as that account, because mode bits do not show access lists.
"""

from collections.abc import Iterable
from pathlib import Path

from sandyard.server.core.errors import UnavailableError
from sandyard.server.node.commands import run

_LIMIT_S = 20.0
_SCRIPT = 'for one; do cd "$one" 2>/dev/null || { printf %s "$one"; exit; }; done'


async def closed_component(paths: Iterable[Path], uid: int) -> Path | None:
    """Return the first of these folders or their parents that an account cannot enter; None if it
    can enter all. Missing folders are skipped.

    Raises:
        InternalError: the check failed.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        whole = path.resolve()
        folders |= dict.fromkeys(one for one in (*reversed(whole.parents), whole) if one.is_dir())
    command = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    output = await run([*command, "sh", "-c", _SCRIPT, "sh", *folders], limit_s=_LIMIT_S)
    return Path(output) if output else None


def refusal(folder: Path, home: Path, uid: int) -> tuple[str, str]:
    """Return an error message for a folder that an account cannot enter, with remedies."""
    return (
        f"machines cannot reach their files in {home}: the account {uid}, under which one runs, "
        f"cannot enter {folder}",
        f"chmod o+x {folder}, or set SANDYARD_HOME to a directory outside it, such as "
        "/var/lib/sandyard",
    )


async def check_enterable(home: Path, paths: Iterable[Path], uid: int) -> None:
    """Return if an account can enter the folders of an installation.

    Raises:
        UnavailableError: it cannot; the message names the folder and two remedies.
    """
    folder = await closed_component(paths, uid)
    if folder is not None:
        raise UnavailableError("; ".join(refusal(folder, home, uid)))
