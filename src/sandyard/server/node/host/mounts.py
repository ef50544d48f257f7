"""The mount namespace of hypervisors, in which world-writable folders are read-only.

A compromised hypervisor runs under its own account, which like any account could write to /tmp and
similar folders without limit. It is therefore started in a mount namespace where it cannot. The
namespace is kept by a file, as `ip netns` does for network namespaces, and survives the server like
the machines do.
"""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import InternalError
from sandyard.server.node.commands import run

_LIMIT_S = 20.0
_OPEN = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock", "/var/crash")  # noqa: S108
_SCRIPT = """
kept=$1 workspaces=$2
shift 2
# A copy of their mounts would keep them in use where what is unmounted on the host stays mounted
# elsewhere, as in most containers.
for one in "$workspaces"/*; do umount -l "$one" 2>/dev/null || true; done
for folder in "$@"; do
    [ -d "$folder" ] && [ ! -L "$folder" ] || continue
    # Only then: what is mounted here on a disk of its own would keep that busy.
    case $kept/ in "$folder"/*) mount --rbind "$kept" "$kept" ;; esac
    mount --rbind "$folder" "$folder"
    mount -o remount,bind,ro "$folder"
done
"""


def mounts_of(home: Path) -> Path:
    """Return the path of the file that keeps the mount namespace of an installation's
    hypervisors."""
    return Path("/run/sandyard") / sha256(str(home).encode()).hexdigest()[:12] / "mounts"


async def make_mounts(home: Path, workspaces: Path) -> None:
    """Create the namespace; running machines keep theirs.

    The home stays as it is, even inside a folder that becomes read-only. The workspaces that are
    mounted in `workspaces` are not mounted there.

    Raises:
        InternalError: the host does not allow it.
    """
    await remove_mounts(home)
    try:
        await _make(mounts_of(home), home.resolve(), workspaces.resolve())
    except (InternalError, OSError) as error:
        with suppress(InternalError):  # an incomplete view would be mistaken for a complete one
            await remove_mounts(home)
        raise InternalError(f"cannot make a view of the host's files: {error}") from error


async def _make(file: Path, home: Path, workspaces: Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A namespace's file can only be mounted where mounts do not spread.
    await run(["mount", "--bind", file.parent, file.parent], limit_s=_LIMIT_S)
    await run(["mount", "--make-private", file.parent], limit_s=_LIMIT_S)
    file.touch()
    # What is unmounted on the host is unmounted there: no disk is kept busy.
    await run(
        ["unshare", f"--mount={file}", "--propagation", "slave", "sh", "-ec", _SCRIPT, "sh",
         home, workspaces, *_OPEN],
        limit_s=_LIMIT_S,
    )  # fmt: skip


async def remove_mounts(home: Path) -> None:
    """Remove the namespace; running machines keep theirs.

    Raises:
        InternalError: the host does not allow it.
    """
    file = mounts_of(home)
    try:
        for place in (file, file.parent):
            while is_mounted(place):
                await run(["umount", place], limit_s=_LIMIT_S)
        if file.parent.is_dir():
            file.unlink(missing_ok=True)
            file.parent.rmdir()
    except OSError as error:
        raise InternalError(f"cannot remove {file.parent}: {error}") from error


def is_mounted(place: Path) -> bool:
    """Tell whether a path is a mount point; `os.path.ismount` does not detect bind mounts."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(place) for line in lines)
