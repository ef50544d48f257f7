"""What is on its way to becoming a file: it stands beside it under a name that nobody else uses,
and takes its place by a rename. Who watches is told of the file alone."""

import os

_NEW, _REPLACING = b".sandyard-new-", b".sandyard-over-"


def part_of(path: bytes, *, replaces: bool) -> bytes:
    """Return another name beside a path that nothing has; it tells whether it `replaces` that."""
    name = (_REPLACING if replaces else _NEW) + os.urandom(8).hex().encode()
    return os.path.join(os.path.dirname(path.rstrip(b"/")) or b"/", name)


def is_in_part(path: bytes) -> bool:
    """Tell whether a path leads to a part, or into one that will be a folder."""
    return any(one.startswith((_NEW, _REPLACING)) for one in path.split(b"/"))


def has_replaced(part: bytes) -> bool:
    """Tell whether a part that has become a file took the place of one."""
    return os.path.basename(part).startswith(_REPLACING)
