"""Which build of Sandyard this is."""

import hashlib
from functools import cache
from pathlib import Path

_DIGITS = 8


@cache
def build_version() -> str:
    """Return the package's version and a hash of its Python code, such as `0.1.0+3f09ac21`.

    It is the same wherever the same code is, installed or in a checkout, so that hosts with
    different code can be told apart between releases.
    """
    # It takes longer to import than this takes to run, and few commands need it.
    from importlib.metadata import version as package_version

    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name, content = path.relative_to(package).as_posix().encode(), path.read_bytes()
        digest.update(b"%d %d " % (len(name), len(content)) + name + content)
    return f"{package_version('sandyard')}+{digest.hexdigest()[:_DIGITS]}"
