"""Whether the accounts that hypervisors run under can reach the installation's files.

A machine's process runs as an account of its own, and opens its image, its disk and its sockets by
path. If any folder on the way is closed to that account, every machine fails when it starts, so
the server checks before it starts, as that account: mode bits alone do not tell of access lists.
"""

from collections.abc import Iterable
from pathlib import Path

from sandyard.server.core.errors import UnavailableError
from sandyard.server.node.commands import run

_LIMIT_S = 20.0
_SCRIPT = 'for one; do cd "$one" 2>/dev/null || { printf %s "$one"; exit; }; done'


async def closed_component(paths: Iterable[Path], uid: int) -> Path | None:
    """Return the first folder on the way to one of these, or one of these themselves, that an
    account cannot enter; None if it can enter all. What does not exist yet is left out.

    Raises:
        InternalError: it cannot be tried.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        whole = path.resolve()
        folders |= dict.fromkeys(one for one in (*reversed(whole.parents), whole) if one.is_dir())
    command = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    said = await run([*command, "sh", "-c", _SCRIPT, "sh", *folders], limit_s=_LIMIT_S)
    return Path(said) if said else None


def refusal(folder: Path, home: Path, uid: int) -> tuple[str, str]:
    """Return what is wrong with a folder that an account cannot enter, and what to do."""
    return (
        f"machines cannot reach their files in {home}: the account {uid}, under which one runs, "
        f"cannot enter {folder}",
        f"chmod o+x {folder}, or set SANDYARD_HOME to a folder outside it, such as "
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
