"""Temporary folders of builders and copies, which are removed even after a kill."""

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def workshop(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a temporary folder, which is removed at the end of the block.

    Folders of builders that were killed are removed first.
    """
    with ExitStack() as held:
        # So that one that is just being made is not taken for abandoned.
        with _locked(parent.resolve()):
            for left in parent.glob(f"{prefix}*"):
                with suppress(OSError), _locked(left, waits=False):
                    _remove(left)
            work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            held.callback(_remove, work)
            held.enter_context(_locked(work))
        yield work


def _remove(folder: Path) -> None:
    """Remove a folder with all its contents, however deep a hostile tree is."""
    subprocess.run(["rm", "-rf", "--one-file-system", "--", folder], check=False)


@contextmanager
def _locked(folder: Path, *, waits: bool = True) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        BlockingIOError: another process holds it, and `waits` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
