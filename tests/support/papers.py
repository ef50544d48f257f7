"""Certificates of an installation that tests make up."""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sandyard.server.links.identities import Authority, new_request
from sandyard.server.links.tunnel.ends import Papers, context_of

INSTALLATION = "test"


@dataclass
class Desk:
    """Whoever hands out certificates."""

    folder: Path
    authority: Authority

    @classmethod
    def new(cls, folder: Path) -> "Desk":
        """Return one with a fresh authority."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, Authority.new(INSTALLATION, datetime.now(UTC)))

    def papers(self, name: str, *, lasts: timedelta = timedelta(hours=1)) -> Papers:
        """Return the papers of one who is called so."""
        key, request = new_request()
        stem = f"{len(list(self.folder.iterdir()))}"
        papers = Papers(*(self.folder / f"{stem}.{kind}" for kind in ("crt", "key", "ca")))
        now = datetime.now(UTC)
        papers.certificate.write_bytes(self.authority.sign(request, name, now, lasts))
        papers.key.write_bytes(key)
        papers.authority.write_bytes(self.authority.certificate)
        return papers

    def tls(
        self, name: str, *, is_server: bool, lasts: timedelta = timedelta(hours=1)
    ) -> ssl.SSLContext:
        """Return what TLS needs of one who is called so."""
        return context_of(self.papers(name, lasts=lasts), is_server=is_server)
