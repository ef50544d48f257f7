"""Host names of previews: `{port}-{sandbox}` or `{port}-{sandbox}-{token}`, below a domain."""

import re
from dataclasses import dataclass

from sandyard.server.service.sandboxes.previews import is_previewed

_LABEL = re.compile(r"([1-9][0-9]{0,4})-(sandbox-[a-z0-9]{12})(?:-([a-z2-7]{26}))?")
_HOST = re.compile(r"(?P<name>[a-z0-9.-]+)(?::(?P<port>[1-9][0-9]{0,4}))?")
_USUAL = frozenset({"80", "443"})


@dataclass(frozen=True)
class PreviewName:
    """What the name of a preview says. `below` is what it lies below, with the port that the client
    uses."""

    port: int
    sandbox_id: str
    token: str | None
    below: str

    @property
    def host(self) -> str:
        """The name without its token, and the client's port."""
        return f"{self.port}-{self.sandbox_id}.{self.below}"

    @property
    def full_host(self) -> str:
        """The name as the client knows it."""
        token = "" if self.token is None else f"-{self.token}"
        return f"{self.port}-{self.sandbox_id}{token}.{self.below}"


def is_below(host: str, domain: str) -> bool:
    """Tell whether a Host header names something below a domain, well formed or not.

    What does is never taken for the platform's own name.
    """
    name = _without_port(host.lower().rpartition("@")[2]).rstrip(".")
    wanted = _without_port(domain)
    return name == wanted or name.endswith(f".{wanted}")


def name_of(host: str, domain: str) -> PreviewName | None:
    """Return what a Host header says, None if it is not exactly the name of a preview.

    The client's port may be any: it may come by a proxy, or by a port that ssh forwards. A name may
    end in a dot, as a fully qualified one.
    """
    found = _HOST.fullmatch(host.lower())
    if found is None:
        return None
    name, port = found["name"].removesuffix("."), found["port"] or ""
    bare = _without_port(domain)
    label = _LABEL.fullmatch(name.removesuffix(f".{bare}")) if name.endswith(f".{bare}") else None
    if label is None or not is_previewed(int(label[1])):
        return None
    below = bare if not port or (port in _USUAL and ":" not in domain) else f"{bare}:{port}"
    return PreviewName(int(label[1]), label[2], label[3], below)


def _without_port(host: str) -> str:
    return re.sub(r":[^:\]]*$", "", host)
