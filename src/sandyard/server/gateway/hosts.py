"""Host names of previews: `{port}-{sandbox}` or `{port}-{sandbox}-{token}`, below a domain."""

import re
from dataclasses import dataclass

from sandyard.server.service.sandboxes.previews import is_previewed

_LABEL = re.compile(r"([1-9][0-9]{0,4})-(sandbox-[a-z0-9]{12})(?:-([a-z2-7]{26}))?")
_USUAL = frozenset({"80", "443"})


@dataclass(frozen=True)
class PreviewName:
    """What the name of a preview says; `host` is without its token."""

    port: int
    sandbox_id: str
    token: str | None
    host: str


def is_below(host: str, domain: str) -> bool:
    """Tell whether a Host header names something below a domain, well formed or not.

    What does is never taken for the platform's own name.
    """
    name = _without_port(host.lower().rpartition("@")[2]).rstrip(".")
    wanted = _without_port(domain)
    return name == wanted or name.endswith(f".{wanted}")


def name_of(host: str, domain: str) -> PreviewName | None:
    """Return what a Host header says, None if it is not exactly the name of a preview.

    The port must be the domain's; one that has none takes the usual ones as well.
    """
    text = host.lower()
    if ":" not in domain and text.rpartition(":")[2] in _USUAL:
        text = _without_port(text)
    if not text.endswith(f".{domain}"):
        return None
    found = _LABEL.fullmatch(text.removesuffix(f".{domain}"))
    if found is None or not is_previewed(int(found[1])):
        return None
    port, sandbox_id = int(found[1]), found[2]
    return PreviewName(port, sandbox_id, found[3], f"{port}-{sandbox_id}.{domain}")


def _without_port(host: str) -> str:
    return re.sub(r":[^:\]]*$", "", host)
