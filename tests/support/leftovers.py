"""What a test may leave behind in its own process and on its host."""

import json
import os
import tempfile
from pathlib import Path

from sandyard.server.node.host.identity import REGISTRY


def open_sockets() -> set[str]:
    """Return the sockets of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def open_things(*, namespaces: bool = False) -> set[str]:
    """Return this process's sockets, homes and mounts, and the installations with a namespace.

    Of those, the ones of another process's installations do not count: they come and go meanwhile.
    """
    folder = Path(tempfile.gettempdir())
    homes = {str(one) for one in folder.glob(f"sy-{os.getpid()}-*")}
    mounts = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    of_tests = (f"{folder}/sy-{os.getpid()}-", f"{folder}/t-{os.getpid()}-")
    names = {one.name.rpartition("-")[0] for one in Path("/run/netns").glob("syd-*")}
    names.discard("syd-test")  # a lab of the other tier may be open
    others = {one for one in names if not _may_be_own(one, of_tests)} if namespaces else names
    return (
        open_sockets()
        | homes
        | {one for one in mounts if one.startswith(of_tests)}
        | {f"namespaces of {one}" for one in names - others}
    )


def _may_be_own(prefix: str, homes: tuple[str, ...]) -> bool:
    """Tell whether an installation is of this process's, or nobody's."""
    try:
        claim = json.loads((REGISTRY / f"{prefix.removeprefix('syd-')}.json").read_text())
    except (OSError, ValueError):
        return True
    return str(claim["home"]).startswith(homes)
