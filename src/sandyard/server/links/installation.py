"""The keys of an installation on several hosts: its certificate authority and its NATS account.

NATS servers have an authority of their own, so that a node cannot use its certificate to act as
one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from typing_extensions import override

from sandyard.server.core.contracts.cluster import Application, Identity, Registrar, trust_of
from sandyard.server.core.errors import ConflictError
from sandyard.server.core.ids import new_uuid
from sandyard.server.links.identities import Authority, control_name, new_request, node_name
from sandyard.server.links.nats.tokens import Key, Role, control_token, node_token

CERTIFICATE_LASTS = timedelta(days=30)
TOKEN_LASTS = timedelta(hours=24)


@dataclass(frozen=True)
class Installation:
    """The installation's secrets, and its id, which is public.

    To replace its authorities without an interruption, new ones are added, which all hosts come to
    trust; then they are used, and all hosts get certificates of them; then the old ones, which do
    not sign any more, are removed. `changed_at` is when the last of these steps was taken.
    """

    id: str
    authority: Authority
    nats: Authority
    operator: Key
    account: Key
    added: tuple[Authority, Authority] | None = None
    """The authority and that of NATS that will be used."""
    replaced: tuple[bytes, bytes] | None = None
    """The certificates of those that were used before."""
    changed_at: datetime | None = None

    @classmethod
    def new(cls, now: datetime) -> "Installation":
        """Return a new one."""
        an_id = new_uuid()
        return cls(
            id=an_id,
            authority=Authority.new(an_id, now),
            nats=Authority.new(an_id, now),
            operator=Key.new(Role.OPERATOR),
            account=Key.new(Role.ACCOUNT),
        )

    @property
    def also_trusted(self) -> tuple[bytes, bytes]:
        """The certificates, beside those of the authority and of that of NATS, that are trusted
        while these are replaced; empty at other times."""
        if self.added is not None:
            return self.added[0].certificate, self.added[1].certificate
        return self.replaced or (b"", b"")

    @property
    def trusted(self) -> bytes:
        """The certificates of the authorities that hosts trust, in PEM."""
        return self.authority.certificate + self.also_trusted[0]

    @property
    def nats_trusted(self) -> bytes:
        """The certificates of the authorities that NATS servers are trusted by."""
        return self.nats.certificate + self.also_trusted[1]

    def with_added(self, now: datetime) -> "Installation":
        """Return it with new authorities that are trusted, and not used yet."""
        if self.added or self.replaced:
            raise ConflictError(
                "cannot add an authority: the last replacement is not over; `sandyard admin "
                "authority show` says what is next"
            )
        added = Authority.new(self.id, now), Authority.new(self.id, now)
        return replace(self, added=added, changed_at=now)

    def with_used(self, now: datetime) -> "Installation":
        """Return it with the authorities in use that were added."""
        if self.added is None:
            raise ConflictError("cannot use another authority: none was added")
        authority, nats = self.added
        replaced = self.authority.certificate, self.nats.certificate
        return replace(
            self, authority=authority, nats=nats, added=None, replaced=replaced, changed_at=now
        )

    def with_removed(self, now: datetime) -> "Installation":
        """Return it without the authorities that were replaced, or were added and not used."""
        if self.added is None and self.replaced is None:
            raise ConflictError("cannot remove an authority: there is only the one in use")
        return replace(self, added=None, replaced=None, changed_at=now)

    def values(self) -> dict[str, str]:
        """Return it as stored."""
        values = {
            "id": self.id,
            "certificate": self.authority.certificate.decode(),
            "key": self.authority.key.decode(),
            "nats_certificate": self.nats.certificate.decode(),
            "nats_key": self.nats.key.decode(),
            "operator": self.operator.seed.hex(),
            "account": self.account.seed.hex(),
        }
        if self.added is not None:
            for name, one in zip(("added", "added_nats"), self.added, strict=True):
                values[f"{name}_certificate"] = one.certificate.decode()
                values[f"{name}_key"] = one.key.decode()
        if self.replaced is not None:
            for name, certificate in zip(("replaced", "replaced_nats"), self.replaced, strict=True):
                values[f"{name}_certificate"] = certificate.decode()
        if self.changed_at is not None:
            values["changed_at"] = self.changed_at.isoformat()
        return values

    @classmethod
    def of(cls, values: Mapping[str, str]) -> "Installation":
        """Return it from its stored form."""

        def authority(name: str) -> Authority:
            return Authority(values[f"{name}certificate"].encode(), values[f"{name}key"].encode())

        added = replaced = changed_at = None
        if "added_certificate" in values:
            added = authority("added_"), authority("added_nats_")
        if "replaced_certificate" in values:
            replaced = (
                values["replaced_certificate"].encode(),
                values["replaced_nats_certificate"].encode(),
            )
        if "changed_at" in values:
            changed_at = datetime.fromisoformat(values["changed_at"])
        return cls(
            values["id"],
            authority(""),
            authority("nats_"),
            Key(Role.OPERATOR, bytes.fromhex(values["operator"])),
            Key(Role.ACCOUNT, bytes.fromhex(values["account"])),
            added,
            replaced,
            changed_at,
        )

    def is_control(self, name: str) -> bool:
        """Tell whether a certificate name (see `identities`) is that of a control plane."""
        return is_control_of(self.id)(name)

    def node_of(self, name: str) -> str | None:
        """Return the id of the node with this certificate name."""
        prefix = node_name(self.id, "")
        return name.removeprefix(prefix) if name.startswith(prefix) else None

    def control_papers(self, server_id: str, now: datetime) -> tuple[bytes, bytes]:
        """Return a new certificate for a control plane, and its key, in PEM."""
        key, request = new_request()
        name = control_name(self.id, server_id)
        return self.authority.sign(request, name, now, CERTIFICATE_LASTS), key

    def control_token(self, user: str, server_id: str, now: datetime) -> str:
        """Return a control plane's token for NATS, for the key `user`."""
        return control_token(self.account, user, server_id, now, TOKEN_LASTS)


def is_control_of(installation: str) -> Callable[[str], bool]:
    """Return a function that tells whether a name is that of a control plane of an installation."""
    prefix = control_name(installation, "")
    return lambda name: name.startswith(prefix)


class InstallationRegistrar(Registrar):
    """See core.contracts.cluster.Registrar; `servers` are where NATS is. `installation` may be
    replaced by one with other authorities."""

    def __init__(
        self, installation: Installation, servers: tuple[str, ...], now: Callable[[], datetime]
    ) -> None:
        self.installation = installation
        self._servers = servers
        self._now = now

    @property
    @override
    def trust(self) -> str:
        own = self.installation
        return trust_of(
            own.authority.certificate.decode(),
            own.also_trusted[0].decode(),
            own.nats_trusted.decode(),
        )

    @override
    def identity_of(self, node_id: str, application: Application) -> Identity:
        own, now = self.installation, self._now()
        name = node_name(own.id, node_id)
        request = application.request.encode()
        token = node_token(own.account, application.key, node_id, now, TOKEN_LASTS)
        return Identity(
            node_id=node_id,
            installation=own.id,
            certificate=own.authority.sign(request, name, now, CERTIFICATE_LASTS).decode(),
            authority=own.authority.certificate.decode(),
            nats_authority=own.nats_trusted.decode(),
            token=token,
            servers=self._servers,
            also_trusted=own.also_trusted[0].decode(),
        )
