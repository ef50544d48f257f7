"""The keys of an installation on several hosts: its certificate authority and its NATS account.

NATS servers have an authority of their own, so that a node cannot use its certificate to act as
one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sandyard.server.core.contracts.cluster import Application, Identity
from sandyard.server.core.ids import new_uuid
from sandyard.server.links.identities import Authority, control_name, new_request, node_name
from sandyard.server.links.nats.tokens import Key, Role, control_token, node_token

CERTIFICATE_LASTS = timedelta(days=30)
TOKEN_LASTS = timedelta(hours=24)


@dataclass(frozen=True)
class Installation:
    """The installation's secrets, and its id, which is public."""

    id: str
    authority: Authority
    nats: Authority
    operator: Key
    account: Key

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

    def values(self) -> dict[str, str]:
        """Return it as stored."""
        return {
            "id": self.id,
            "certificate": self.authority.certificate.decode(),
            "key": self.authority.key.decode(),
            "nats_certificate": self.nats.certificate.decode(),
            "nats_key": self.nats.key.decode(),
            "operator": self.operator.seed.hex(),
            "account": self.account.seed.hex(),
        }

    @classmethod
    def of(cls, values: Mapping[str, str]) -> "Installation":
        """Return it from its stored form."""
        return cls(
            values["id"],
            Authority(values["certificate"].encode(), values["key"].encode()),
            Authority(values["nats_certificate"].encode(), values["nats_key"].encode()),
            Key(Role.OPERATOR, bytes.fromhex(values["operator"])),
            Key(Role.ACCOUNT, bytes.fromhex(values["account"])),
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


class InstallationRegistrar:
    """See core.contracts.cluster.Registrar; `servers` are where NATS is."""

    def __init__(
        self, installation: Installation, servers: tuple[str, ...], now: Callable[[], datetime]
    ) -> None:
        self._installation = installation
        self._servers = servers
        self._now = now

    def identity_of(self, node_id: str, application: Application) -> Identity:
        """See core.contracts.cluster.Registrar.identity_of."""
        own, now = self._installation, self._now()
        name = node_name(own.id, node_id)
        request = application.request.encode()
        token = node_token(own.account, application.key, node_id, now, TOKEN_LASTS)
        return Identity(
            node_id=node_id,
            installation=own.id,
            certificate=own.authority.sign(request, name, now, CERTIFICATE_LASTS).decode(),
            authority=own.authority.certificate.decode(),
            nats_authority=own.nats.certificate.decode(),
            token=token,
            servers=self._servers,
        )
