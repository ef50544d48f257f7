"""What a test may leave behind in its own process and on its host."""

import os
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


def open_things() -> set[str]:
    """Return this process's sockets and homes, and the host's mounts and our namespaces."""
    found = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    namespaces = Path("/run/netns")
    found |= {str(one) for one in namespaces.glob("syd-*")} if namespaces.is_dir() else set()
    homes = {str(one) for one in Path("/tmp").glob(f"sy-{os.getpid()}-*")}
    return found | homes | open_sockets()
