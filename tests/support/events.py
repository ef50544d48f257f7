"""Server-sent events, read as a client does."""

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Any

Heard = list[tuple[str, str | None, dict[str, Any]]]


def read_events(text: str) -> Heard:
    """Return name, id and data of each event, as a browser would take them."""
    return list(events_of(f"{text}\n".split("\n")))


def events_of(lines: Iterable[str]) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Yield name, id and data of each event as its lines come."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        if "data" in fields:
            yield fields["event"], fields.get("id"), json.loads(fields["data"])
        fields = {}


def bytes_of(heard: Heard) -> bytes:
    """Return what was printed, of events in base64."""
    return b"".join(base64.b64decode(one[2]["data"]) for one in heard if one[0] == "output")
