"""Unfinished files: each is written beside its target under a name that nothing else uses, and then
renamed. Those who watch the directory are told of the target only."""

import os

_NEW, _REPLACING = b".sandyard-new-", b".sandyard-over-"


def part_of(path: bytes, *, replaces: bool) -> bytes:
    """Return an unused name beside a path; it encodes whether it `replaces` an existing file."""
    name = (_REPLACING if replaces else _NEW) + os.urandom(8).hex().encode()
    return os.path.join(os.path.dirname(path.rstrip(b"/")) or b"/", name)


def is_in_part(path: bytes) -> bool:
    """Tell whether a path is an unfinished file, or is inside an unfinished directory."""
    return any(one.startswith((_NEW, _REPLACING)) for one in path.split(b"/"))


def has_replaced(part: bytes) -> bool:
    """Tell whether a finished part has replaced a file."""
    return os.path.basename(part).startswith(_REPLACING)
