"""Where connections come from: sources, and how many connections each has open."""

import ipaddress
from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class BySource(Generic[_T]):
    """Open connections, oldest first, with the number of each source."""

    def __init__(self) -> None:
        self._sources: dict[_T, str] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return the number of connections."""
        return len(self._sources)

    def __iter__(self) -> Iterator[_T]:
        """Iterate over the connections."""
        return iter(self._sources)

    def add(self, one: _T, source: str) -> None:
        """Add a connection."""
        self._sources[one] = source
        self._counts[source] += 1

    def remove(self, one: _T) -> str | None:
        """Remove a connection, and return its source; None if it is not there."""
        source = self._sources.pop(one, None)
        if source is not None:
            self._counts[source] -= 1
            if not self._counts[source]:
                del self._counts[source]
        return source

    def source(self, one: _T) -> str | None:
        """Return the source of a connection; None if it is not there."""
        return self._sources.get(one)

    def count(self, source: str) -> int:
        """Return the number of connections of a source."""
        return self._counts[source]

    def of(self, source: str) -> Iterator[_T]:
        """Iterate over the connections of a source."""
        return (one for one, its in self._sources.items() if its == source)


def source_of(address: str) -> str:
    """Return what an address is counted as: itself, or for IPv6 its /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
