"""The last of what a guest printed, kept in a file of bounded size."""

import contextlib
import os
from pathlib import Path

_LIMIT = 1024 * 1024
NAME = "console.log"


def append_console(folder: Path, said: bytes) -> None:
    """Add to the console's log of a machine; when it is over its limit, the older half goes."""
    if not said or not folder.is_dir():
        return
    path = folder / NAME
    with contextlib.suppress(OSError):  # a full disk costs the log, not the machine
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
            file.write(said)
            size = file.tell()
        if size > _LIMIT:
            part = path.with_suffix(".part")
            part.write_bytes(path.read_bytes()[-_LIMIT // 2 :])
            part.replace(path)
