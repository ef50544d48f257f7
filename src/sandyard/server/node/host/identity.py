"""The identity of this installation, and its names and numbers on the host.

Several installations may share a host. Each has an id that is part of all its names, and an index
that determines its subnet and its range of accounts. Claims are files in a folder shared by all
installations of the host. They are taken under a lock and become void when the home of their
installation is deleted. A home that is out of sight is not deleted: it may be on a file system that
is not mounted here, while its machines run.
"""

import fcntl
import ipaddress
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.errors import UnavailableError
from sandyard.server.drivers.processes import boot_id

REGISTRY = Path("/var/lib/sandyard-installations")
SLOTS = 1024
_PREFIX = "syd-"
_INDEXES = 64
_UID_FIRST = 1_900_000_000  # above every range that systemd.io/UIDS-GIDS assigns
_WHOLE = ipaddress.IPv4Network("10.200.0.0/14")


@dataclass(frozen=True)
class Identity:
    """An installation's names and numbers on its host."""

    id: str
    index: int
    subnet: ipaddress.IPv4Network
    uid_first: int

    @property
    def prefix(self) -> str:
        """The prefix of the names of all its links and namespaces."""
        return f"{_PREFIX}{self.id}"

    @property
    def table(self) -> str:
        """The name of its nftables table on the host."""
        return f"sandyard_{self.id}"

    @property
    def egress_uids(self) -> range:
        """The accounts under which the egress processes of its slots run."""
        first = self.uid_first + _INDEXES * SLOTS
        return range(first, first + SLOTS)

    @property
    def uids(self) -> range:
        """The accounts under which its machines run."""
        return range(self.uid_first, self.uid_first + SLOTS)


def prefix_in(home: Path) -> str | None:
    """Return the prefix of the installation in a home; None if it has no identity yet."""
    kept = _read(home / "instance.json")
    return None if kept is None else f"{_PREFIX}{kept['id']}"


def take_identity(
    home: Path,
    *,
    routes: Iterable[ipaddress.IPv4Network],
    subnet: ipaddress.IPv4Network | None = None,
    registry: Path = REGISTRY,
    at_work: Callable[[range], set[int]] = lambda _: set(),
) -> Identity:
    """Return the identity of the installation in `home`; it is chosen the first time.

    `routes` are networks that the host has a route to; `subnet` is the operator's choice.
    `at_work` returns the accounts of a range under which processes run: such a range is not chosen.

    Raises:
        UnavailableError: no subnet is free.
    """
    registry.mkdir(parents=True, exist_ok=True)
    with _locked(registry / ".lock"):
        kept = _read(home / "instance.json")
        others = {claim["index"] for claim in _claims(registry, home, kept)}
        if kept is not None and kept["index"] not in others:
            chosen = {"id": kept["id"], "index": kept["index"]}
        else:
            chosen = {
                "id": secrets.token_hex(2),
                "index": _free_index(others, list(routes), at_work),
            }
        home.mkdir(parents=True, exist_ok=True)
        _write(home / "instance.json", chosen)
        claim = {
            **chosen, "home": str(home.resolve()), "device": home.stat().st_dev, "boot": boot_id()
        }  # fmt: skip
        _write(registry / f"{chosen['id']}.json", claim)
    index = int(str(chosen["index"]))
    return Identity(
        id=str(chosen["id"]),
        index=index,
        subnet=subnet or _subnet(index),
        uid_first=_UID_FIRST + index * SLOTS,
    )


def give_back_identity(home: Path, *, registry: Path = REGISTRY) -> None:
    """Release the claims of `home` on this host, when its installation is removed."""
    kept = _read(home / "instance.json")
    if kept is not None:
        (registry / f"{kept['id']}.json").unlink(missing_ok=True)
        (home / "instance.json").unlink(missing_ok=True)


def _free_index(
    others: set[object],
    routes: list[ipaddress.IPv4Network],
    at_work: Callable[[range], set[int]],
) -> int:
    for index in range(_INDEXES):
        overlaps = any(_subnet(index).overlaps(route) for route in routes if route.prefixlen)
        if index in others or overlaps:
            continue
        identity = Identity("", index, _subnet(index), _UID_FIRST + index * SLOTS)
        if not at_work(identity.uids) and not at_work(identity.egress_uids):
            return index
    raise UnavailableError(
        f"cannot find a free subnet in {_WHOLE}: routes or other installations cover it; "
        "set SANDYARD_NODE__SUBNET to a free private /20"
    )


def _subnet(index: int) -> ipaddress.IPv4Network:
    first = int(_WHOLE.network_address) + index * SLOTS * 4
    return ipaddress.IPv4Network((first, 20))


def _claims(
    registry: Path, home: Path, kept: dict[str, object] | None
) -> Iterator[dict[str, object]]:
    """Yield the claims of other installations. One in a container may have a home of the same
    path."""
    for path in registry.glob("*.json"):
        claim = _read(path)
        if claim is None or _is_void(claim):
            path.unlink(missing_ok=True)
        elif claim["home"] != str(home.resolve()) or (kept and claim["id"] != kept["id"]):
            yield claim


def _is_void(claim: dict[str, object]) -> bool:
    """Return whether an installation is gone: its home was deleted, or was not there since the
    host started."""
    home = Path(str(claim["home"]))
    if (home / "instance.json").exists():
        there = _read(home / "instance.json")
        is_its = there is None or there["id"] == claim["id"]
        return not is_its and claim.get("boot") != boot_id()
    nearest = next(one for one in (home, *home.parents) if one.exists())
    is_in_sight = nearest.stat().st_dev == claim.get("device")
    return is_in_sight or claim.get("boot") != boot_id()


def _write(path: Path, value: dict[str, object]) -> None:
    """Write a file atomically and durably: without it, resources on this host cannot be found
    again."""
    if _read(path) == value:
        return
    part = path.with_name(f"{path.name}.part")
    with part.open("w") as file:
        file.write(json.dumps(value))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(path: Path) -> dict[str, object] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "index" in value and "id" in value else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Only root may open it: a process that locks it keeps every installation from starting.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
