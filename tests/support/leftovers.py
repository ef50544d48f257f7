"""What a test may leave behind in its own process and on its host."""

import os
import tempfile
from pathlib import Path


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

    Ask for those only where the test could have made one: another installation on the same host may
    come and go meanwhile.
    """
    folder = Path(tempfile.gettempdir())
    homes = {str(one) for one in folder.glob(f"sy-{os.getpid()}-*")}
    mounts = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    of_tests = (f"{folder}/sy-{os.getpid()}-", f"{folder}/t-{os.getpid()}-")
    names = [one.name for one in Path("/run/netns").glob("syd-*")] if namespaces else []
    return (
        open_sockets()
        | homes
        | {one for one in mounts if one.startswith(of_tests)}
        | {f"namespaces of {one.rpartition('-')[0]}" for one in names}
    )
