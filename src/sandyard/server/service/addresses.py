"""The public addresses of the SSH gateway, previews and desktops."""

from dataclasses import dataclass
from typing import Literal

from sandyard.server.core.records import Sandbox


@dataclass(frozen=True)
class SshAddress:
    """The SSH gateway's address; `host_key` is its public key, `ssh-ed25519 AAAA…`."""

    host: str
    port: int
    host_key: str

    @property
    def known_hosts(self) -> str:
        """The line of a known_hosts file (sshd(8)) with which a client verifies the gateway."""
        name = self.host if self.port == 22 else f"[{self.host}]:{self.port}"
        return f"{name} {self.host_key}"


@dataclass(frozen=True)
class Addresses:
    """See the module. `preview_domain` is what the names of previews end in, with a port where
    that is not the usual one; without an `ssh` there is no gateway for that. `desktops` are the
    installation's templates whose sandboxes have a screen."""

    base_url: str
    preview_domain: str
    preview_scheme: Literal["http", "https"] = "http"
    ssh: SshAddress | None = None
    public_ip: str | None = None
    desktops: frozenset[str] = frozenset()

    def has_desktop(self, sandbox: Sandbox) -> bool:
        """Tell whether a sandbox has a screen."""
        return sandbox.has_desktop or sandbox.template in self.desktops

    def desktop_url(self, sandbox_id: str) -> str:
        """Return the URL of a sandbox's desktop page."""
        return f"{self.base_url}/desktop/{sandbox_id}"
