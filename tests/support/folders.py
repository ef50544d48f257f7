"""Files looked for in folders that come and go meanwhile."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from sandyard.server.drivers.sparse import extents


def found_in(home: Path, pattern: str) -> list[Path]:
    """Return what lies below a folder and ends like a pattern ("snapshots/*"), sorted.

    What vanishes while it looks is passed by: `Path.rglob` fails of it, and a machine of the pool
    may end at any time.
    """
    places = (
        Path(folder, name)
        for folder, *inside in os.walk(home)
        for names in inside
        for name in names
    )
    return sorted(place for place in places if place.match(pattern))


def files_with(what: bytes, home: Path) -> list[Path]:
    """Return the files below a folder that contain these bytes; holes are skipped.

    Disks and memory of machines are read as well, and files may vanish meanwhile.
    """
    found = []
    for path in found_in(home, "*"):
        with suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    for start, end in extents(file.fileno()):
                        file.seek(start)
                        if what in file.read(end - start):
                            found.append(path)
    return found
