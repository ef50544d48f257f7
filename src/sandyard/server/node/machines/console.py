"""The end of a guest's console output, in a file of bounded size."""

import contextlib
import os
from pathlib import Path

_LIMIT = 1024 * 1024
_FAILED_MAX = 64
TAIL = 64 * 1024
NAME = "console.log"


def append_console(folder: Path, output: bytes) -> None:
    """Append to a machine's console log; if it is over its limit, its older half is removed."""
    if not output or not folder.is_dir():
        return
    path = folder / NAME
    with contextlib.suppress(OSError):  # a full disk costs the log, not the machine
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
            file.write(output)
            size = file.tell()
        if size > _LIMIT:
            part = path.with_suffix(".part")
            part.write_bytes(path.read_bytes()[-_LIMIT // 2 :])
            part.replace(path)


def read_console(folder: Path) -> bytes:
    """Return the end of a machine's console output; empty if there was none."""
    return _tail(folder / NAME)


class FailedConsoles:
    """The console output of machines that never started, which are removed otherwise."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, sandbox_id: str, machine_folder: Path) -> None:
        """Keep a machine's console output; the oldest is removed for it.

        A machine that printed nothing does not replace the output of an earlier attempt.
        """
        with contextlib.suppress(OSError):
            output, path = read_console(machine_folder), self._folder / sandbox_id
            if not output and path.is_file():
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(output)
            kept = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in kept[:-_FAILED_MAX]:
                path.unlink(missing_ok=True)

    def find(self, sandbox_id: str) -> bytes | None:
        """Return what was kept for a sandbox, if anything."""
        path = self._folder / sandbox_id
        return _tail(path) if path.is_file() else None

    def forget(self, sandbox_id: str) -> None:
        """Remove what was kept for a sandbox."""
        with contextlib.suppress(OSError):
            (self._folder / sandbox_id).unlink(missing_ok=True)


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read(TAIL)
    except FileNotFoundError:
        return b""
