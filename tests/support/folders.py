"""Files looked for in folders that come and go meanwhile."""

from __future__ import annotations

import os
from pathlib import Path


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
