"""All settings, in one place, read once.

A value comes from, first to last: what a command was given, the environment (`SANDYARD_…`, two
underscores between section and name), `config.toml` in the installation's home, the default.
"""

import os
import re
import sys
from decimal import Decimal
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    IPvAnyNetwork,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from sandyard.server.node.images.definitions import ARGUMENTS_ARE, is_command_line

DEFAULT_HOME = Path("/var/lib/sandyard")
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = rf"{_LABEL}(\.{_LABEL})*(:[1-9][0-9]{{0,4}})?"
_HOST = r"^[A-Za-z0-9][A-Za-z0-9.:-]*$"


class Section(BaseModel):
    """Base of the sections: a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HttpSettings(Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8080, ge=1, le=65535, description="The port to listen on.")
    metrics_token: SecretStr | None = Field(
        None,
        min_length=1,
        description="What /metrics asks for as a Bearer token; without it, only loopback.",
    )

    connections: int = Field(
        4096,
        ge=16,
        le=1_000_000,
        description="Connections open at one time; never more than half of the descriptors.",
    )
    connections_per_address: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="How many of them may come from one IPv4 address or IPv6 /64; raise it behind "
        "a proxy.",
    )
    hosts: tuple[str, ...] = Field(
        (),
        description="Host names that the API answers to, besides IP addresses and `localhost`; "
        "others get 421. Default: every name that is not a preview's.",
    )
    trusted_proxies: tuple[IPvAnyNetwork, ...] = Field(
        (),
        description="Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto "
        "are believed, such as `127.0.0.1`; default: none.",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="Origins whose pages may call the API in a browser, such as "
        "`https://app.example.org`; `*`: any.",
    )

    public_url: str | None = Field(
        None,
        description="Where clients reach this server, such as `https://sandyard.example.org`; "
        "default: the address and port that it listens on.",
    )
    public_ip: str | None = Field(
        None, description="The host's public address, which sandboxes tell as `publicIp`."
    )

    @field_validator("public_url")
    @classmethod
    def _is_an_origin(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parsed = urlsplit(url)
        is_bare = parsed.path in ("", "/") and not (parsed.query or parsed.fragment)
        if parsed.scheme not in ("http", "https") or not parsed.hostname or not is_bare:
            raise ValueError("it must be http:// or https:// and a host, without a path")
        return url.rstrip("/")


class SshSettings(Section):
    """The SSH gateway."""

    enabled: bool = Field(True, description="Whether it is opened.")
    host: str | None = Field(
        None, description="The address to listen on; default: that of `http.host`."
    )
    port: int = Field(2222, ge=1, le=65535, description="The port to listen on.")
    public_host: str | None = Field(
        None,
        pattern=_HOST,
        description="The host that clients are told to log in to; default: the host of "
        "`http.public_url`, else the address that it listens on.",
    )
    public_port: int | None = Field(
        None, ge=1, le=65535, description="The port they are told; default: `ssh.port`."
    )
    connections: int = Field(1000, ge=1, le=100_000, description="Connections open at one time.")
    connections_per_address: int = Field(
        200, ge=1, le=100_000, description="How many of them may come from one address."
    )


class PreviewSettings(Section):
    """Preview URLs of what listens in sandboxes."""

    domain: str | None = Field(
        None,
        description="What the host names of previews end in, with a port where that is not the "
        "usual one; default: `preview.localhost` and the port of the server. Its wildcard "
        "(`*.domain`) must lead here.",
    )
    scheme: Literal["http", "https"] = Field(
        "http", description="`https` where a proxy in front, or the listener below, speaks TLS."
    )
    token_s: int = Field(
        3600,
        ge=60,
        le=30 * 86_400,
        description="Seconds that a preview URL holds at least, where its ttl does not say.",
    )
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="A port for previews alone, on the same address; default: none, they share "
        "the server's.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="A certificate for `*.domain` (PEM, with those above it), for that port to "
        "speak TLS by itself.",
    )
    tls_key: Path | None = Field(None, description="The certificate's private key (PEM).")

    @field_validator("domain")
    @classmethod
    def _is_a_domain(cls, domain: str | None) -> str | None:
        if domain is not None and not re.fullmatch(_DOMAIN, domain):
            raise ValueError("it must be a domain in lower case, such as preview.example.org")
        return domain

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_certificate is not None and self.port is None:
            raise ValueError("tls_certificate is for a port of its own: set preview.port as well")
        return self


class StoreSettings(Section):
    """The database."""

    url: SecretStr | None = Field(
        None,
        description="`sqlite:///PATH` or `postgresql://…`; default: `sandyard.db` in the home.",
    )


class FirecrackerSettings(Section):
    """Firecracker, where the host has KVM that really works."""

    binary: str | None = Field(
        None,
        description="Firecracker's program; default: that on PATH, else the one fetched by "
        "`sandyard setup firecracker`.",
    )
    jailer: str | None = Field(None, description="Its jailer's program; default: as above.")
    disk_mib_per_s: int = Field(
        0, ge=0, le=1024 * 1024, description="MiB a second each disk of a machine may move; 0: any."
    )
    network_mib_per_s: int = Field(
        0, ge=0, le=1024 * 1024, description="MiB a second a machine may send, and receive; 0: any."
    )


class NodeSettings(Section):
    """The host's machines."""

    driver: Literal["auto", "firecracker", "qemu-kvm", "qemu-tcg", "fake"] = Field(
        "auto", description="`auto` takes the best that a probe machine boots under."
    )
    qemu_binary: str = Field("qemu-system-x86_64", description="QEMU's program.")
    tb_size_mib: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="MiB of translated code a machine may keep (TCG); default: a quarter of its "
        "memory, 128 at least and 256 at most.",
    )
    templates_dir: Path | None = Field(
        None, description="Where template definitions are; default: those of this version."
    )
    kernel: Path | None = Field(
        None,
        description="A kernel of your own for all templates, a bzImage or an ELF `vmlinux`, in "
        "place of the distribution's; see the how-to on kernels. Templates take it in when they "
        "are built.",
    )
    kernel_modules: Path | None = Field(
        None,
        description="The folder of its modules, such as `/lib/modules/6.12.0`; default: all that "
        "machines need is built in.",
    )
    kernel_arguments: str = Field(
        "",
        description="What kernels are told on their command line besides what Sandyard tells them; "
        "likewise taken in when templates are built.",
    )
    extra_ca: Path | None = Field(
        None,
        description="A file of certificates (PEM) that sandboxes trust besides, for hosts behind "
        "TLS inspection; templates take it in when they are built.",
    )
    build_network: Literal["own", "host"] = Field(
        "own",
        description="The network of template builds. `own`: builds reach what the host reaches, "
        "but not its loopback addresses. `host`: the host's network, for an apt proxy that listens "
        "on a loopback address.",
    )
    images_dir: Path | None = Field(
        None, description="Where built images are kept; default: `images` in the home."
    )
    cache_dir: Path | None = Field(
        None, description="Where package archives are kept; default: `cache` in the home."
    )
    subnet: IPv4Network | None = Field(
        None, description="A private /20 for slots; default: a free one of 10.200.0.0/14."
    )
    allow: tuple[IPv4Network, ...] = Field(
        (), description="Private networks that sandboxes may reach all the same."
    )
    dns: tuple[IPvAnyAddress, ...] = Field(
        (),
        description="DNS servers that answer sandboxes' queries; default: the host's own. With "
        "those, names that only the host's network knows resolve in sandboxes as well, though what "
        "they lead to stays out of reach; name public servers to keep such names private.",
    )
    probe_s: float = Field(
        20,
        gt=0,
        le=3600,
        description="Seconds a probe machine may take to come up before its hypervisor is passed "
        "over; six times that with a kernel of one's own.",
    )
    slowest: float = Field(
        20,
        ge=1,
        le=100,
        description="How many times longer than is said here a slow host's guests may take to "
        "start and to answer; how much slower it is, its probe machine tells. 1: never longer.",
    )
    boot_s: float = Field(
        120, gt=0, description="Seconds a machine may take to start, where a probe is up in 5."
    )
    no_progress_s: float = Field(
        25,
        gt=0,
        description="Seconds of a silent console after which a boot is tried again, likewise.",
    )
    golden_machines: bool = Field(
        True,
        description="Start sandboxes from saved machines; false boots each from cold, and there "
        "is no pool.",
    )
    odd_goldens_mib: int = Field(
        2048,
        ge=0,
        description="MiB of disk for the saved machines of shapes that are not a template's usual "
        "one; those used least lately go first.",
    )
    boots_at_once: int = Field(2, ge=1, description="How many machines boot at the same time.")
    restores_at_once: int = Field(
        4, ge=1, description="How many machines are restored at the same time."
    )
    heartbeat_s: float = Field(
        5, gt=0, description="Seconds between two questions whether an agent is there."
    )
    memory_floor_mib: int = Field(
        1024, ge=0, description="MiB of memory the host keeps; below, creates get no_capacity."
    )
    disk_floor_mib: int = Field(
        1024, ge=0, description="MiB of disk the host keeps; below, creates get no_capacity."
    )
    memory_overcommit: float = Field(
        3.0,
        ge=0.1,
        description="How many times the host's memory may be promised to machines in all. If it "
        "runs short, what was used least lately is paused.",
    )
    disk_overcommit: float = Field(
        20.0,
        ge=0.1,
        description="How many times the free disk may be promised in all. If it is full, machines "
        "stand still until there is room.",
    )

    @model_validator(mode="after")
    def _kernel_of_modules(self) -> Self:
        if self.kernel_modules is not None and self.kernel is None:
            raise ValueError("kernel_modules are those of a kernel: set node.kernel as well")
        return self

    @field_validator("kernel_arguments")
    @classmethod
    def _one_line(cls, arguments: str) -> str:
        if not is_command_line(arguments):
            raise ValueError(f"it must be {ARGUMENTS_ARE}")
        return arguments

    @field_validator("subnet")
    @classmethod
    def _large_enough(cls, subnet: IPv4Network | None) -> IPv4Network | None:
        if subnet is not None and (subnet.prefixlen > 20 or not subnet.is_private):
            raise ValueError("it must be a private network of at least 4096 addresses (a /20)")
        return subnet


class PoolSettings(Section):
    """Machines that wait, running, for whoever creates a sandbox."""

    floor: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="How many always wait for each template's default shape; unset: as many as "
        "the host has memory and processors for.",
    )
    ceiling: int = Field(
        10, ge=0, le=1000, description="How many wait at most for one shape; 0: none ever."
    )
    demand_window_s: float = Field(
        60, gt=0, description="Seconds for which a create keeps one more waiting."
    )


class AccountSettings(Section):
    """Organizations and users."""

    default_plan: str = Field(
        "enterprise", description="The plan of new organizations; see `plans`."
    )
    organizations_per_user: int = Field(
        5,
        ge=1,
        le=10_000,
        description="How many organizations a user may be in and still found another.",
    )
    failed_logins_per_minute: int = Field(
        30, ge=1, description="Credentials that are no good an address may try in a minute."
    )


class SessionSettings(Section):
    """Session tokens of an identity provider; without one, API keys only."""

    provider: Literal["workos", "oidc"] | None = Field(
        None, description="`workos`, or `oidc` for any other OpenID Connect provider."
    )
    client_id: str | None = Field(None, description="WorkOS: the client id; its keys are found.")
    issuer: str | None = Field(
        None,
        description="Who must have issued a token. `oidc`: exactly so. `workos`: how it begins, "
        "by default `https://api.workos.com/`.",
    )
    jwks_url: str | None = Field(
        None, description="Where the provider's keys are; default: found out from the above."
    )
    audience: str | None = Field(
        None, description="Whom a token must be for (`aud`); `oidc` needs it."
    )
    algorithms: tuple[Literal["RS256", "ES256"], ...] = Field(
        ("RS256",), min_length=1, description="How a token may be signed."
    )
    skew_s: int = Field(30, ge=0, le=300, description="Seconds that clocks may differ.")
    org_claim: str = Field("org_id", description="The claim that names the organization.")
    role_claim: str = Field("role", description="The claim that names the role.")
    admin_roles: tuple[str, ...] = Field(
        ("admin",), description="The provider's roles that make an admin; others make a member."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.provider == "workos" and not (self.client_id or self.jwks_url):
            raise ValueError("the provider workos needs client_id")
        if self.provider == "oidc" and not (self.issuer and self.audience):
            raise ValueError("the provider oidc needs issuer and audience")
        for url in (self.issuer, self.jwks_url):
            if url is not None and not _is_safe(url):
                raise ValueError(f"{url} must begin with https://")
        return self


def _is_safe(url: str) -> bool:
    """Tell whether nobody on the way can change what is read there."""
    parsed = urlsplit(url)
    is_local = parsed.hostname in ("127.0.0.1", "::1", "localhost") and parsed.username is None
    return parsed.scheme == "https" or (parsed.scheme == "http" and is_local)


class PriceSettings(Section):
    """Prices in cents; up to six places after the point."""

    vcpu_hour: Decimal = Field(
        Decimal("5"), ge=0, le=1_000_000, decimal_places=6, description="Of a vCPU for an hour."
    )
    memory_gib_hour: Decimal = Field(
        Decimal("1.5"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Of a GiB of memory for an hour.",
    )
    disk_gib_month: Decimal = Field(
        Decimal("10"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Of a GiB of a running sandbox's disk for a month of 730 hours.",
    )
    storage_gib_month: Decimal = Field(
        Decimal("10"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Of a GiB that is kept (paused sandboxes, snapshots, workspaces) for such a "
        "month.",
    )


class BillingSettings(Section):
    """Credits."""

    enforce: bool = Field(
        True,
        description="Refuse and pause what cannot be paid for; false only keeps the count.",
    )
    sign_up_cents: int = Field(
        10_000, ge=0, le=10**12, description="What a user's first organization is given, once."
    )
    prices: PriceSettings = PriceSettings()
    stripe_secret: SecretStr | None = Field(
        None, description="Stripe's secret key; without it, no top-ups by card."
    )
    stripe_webhook_secret: SecretStr | None = Field(
        None, description="What Stripe signs its events with; see the how-to on teams."
    )
    stripe_api: str | None = Field(None, description="Another address of Stripe's API, for tests.")
    currency: str = Field("usd", pattern=r"^[a-z]{3}$", description="What a cent is a cent of.")


class PlanSettings(Section):
    """What organizations of a plan may have; what is left out has no limit."""

    requests_per_minute: int | None = Field(None, ge=1, description="Of a key, and of a user.")
    sandboxes: int | None = Field(None, ge=0, description="Running at one time.")
    vcpus: int | None = Field(None, ge=0, description="Of those that run.")
    memory_gb: int | None = Field(None, ge=0, description="Of those that run.")
    disk_gb: int | None = Field(None, ge=0, description="Of all that are not deleted.")
    storage_gb: int | None = Field(None, ge=0, description="In all workspaces together.")
    test_sandboxes: int | None = Field(2, ge=0, description="Of test keys.")
    snapshots: int | None = Field(None, ge=0, description="Snapshots that are kept.")
    snapshot_gb: int | None = Field(None, ge=0, description="Of all that are kept.")
    test_snapshots: int | None = Field(2, ge=0, description="Of test keys' sandboxes.")


class WorkspaceSettings(Section):
    """Workspaces: folders that outlive sandboxes."""

    quota_mib: int = Field(
        10_240, ge=16, le=2**24, description="MiB that a new workspace may hold."
    )
    upload_mib: int = Field(
        100, ge=1, le=2**20, description="MiB of the largest file that is taken in one upload."
    )
    volumes: Literal["auto", "images", "folders"] = Field(
        "auto",
        description="What files lie in: `images` are file systems of their own, which the kernel "
        "keeps to their size; `folders` are for a mount that servers share. `auto` is images "
        "wherever they can be mounted.",
    )
    folder: Path | None = Field(
        None, description="Where they lie; default: `workspaces` in the home."
    )
    attribute_cache_s: int = Field(
        0,
        ge=0,
        le=60,
        description="How many seconds a sandbox may cache names, sizes and times of files in a "
        "mounted workspace. 0: changes by others are visible at once. A higher value makes "
        "programs that handle many small files up to twice as fast. A file that is opened always "
        "has its current content.",
    )


class ClusterSettings(Section):
    """Several hosts: `sandyard control` and `sandyard node`. On one machine none of it is used."""

    nats: tuple[str, ...] = Field(
        (),
        description="Control planes: where NATS is, as they and the nodes reach it, such as "
        '`["tls://10.0.0.5:4222"]`.',
    )
    host: str = Field(
        "0.0.0.0",  # noqa: S104 - both ends of what listens here show certificates
        description="The address to listen on: a control plane for nodes that join, a node for "
        "control planes.",
    )
    port: int = Field(8700, ge=1, le=65535, description="The port to listen on, TCP with TLS.")
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="A node: the port on which it serves its own /metrics, at `http.host`, as "
        "`http.metrics_token` allows; default: none.",
    )
    address: str | None = Field(
        None,
        pattern=_HOST,
        description="The host by which the others reach this one; default: a control plane's own "
        "name, and the address by which a node reached the control plane when it joined.",
    )

    @field_validator("nats")
    @classmethod
    def _are_servers(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for one in servers:
            parsed = urlsplit(one)
            if parsed.scheme not in ("tls", "nats") or not parsed.hostname or parsed.path:
                raise ValueError("each must be tls://HOST:PORT")
            if parsed.scheme == "nats" and parsed.hostname not in ("127.0.0.1", "::1", "localhost"):
                raise ValueError(
                    "nats:// is in the clear, and for loopback alone; use tls://HOST:PORT"
                )
        return servers


class LogSettings(Section):
    """The log: on standard error, or in a file that is kept from growing."""

    file: Path | None = Field(
        None, description="Where to write instead; `scripts/up` sets `server.log` in the home."
    )
    file_mib: int = Field(
        32, ge=1, le=10_240, description="MiB at which the file is begun anew; three are kept."
    )

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least severe lines to write."
    )
    format: Literal["auto", "text", "json"] = Field(
        "auto", description="`auto` is text on a terminal and JSON lines elsewhere."
    )


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix="SANDYARD_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
    )

    home: Path = Field(DEFAULT_HOME, description="Where the installation's state lives.")
    http: HttpSettings = HttpSettings()
    ssh: SshSettings = SshSettings()
    preview: PreviewSettings = PreviewSettings()
    store: StoreSettings = StoreSettings()
    node: NodeSettings = NodeSettings()
    firecracker: FirecrackerSettings = FirecrackerSettings()
    pool: PoolSettings = PoolSettings()
    accounts: AccountSettings = AccountSettings()
    sessions: SessionSettings = SessionSettings()
    billing: BillingSettings = BillingSettings()
    plans: dict[str, PlanSettings] = Field(
        {
            "free": PlanSettings(
                requests_per_minute=60, storage_gb=10, snapshots=10, snapshot_gb=10
            ),
            "pro": PlanSettings(
                requests_per_minute=300, storage_gb=50, snapshots=100, snapshot_gb=100
            ),
            "team": PlanSettings(
                requests_per_minute=1000, storage_gb=500, snapshots=1000, snapshot_gb=1000
            ),
            "enterprise": PlanSettings(),
        },
        description="Plans by name, each a table: `requests_per_minute`, `sandboxes`, `vcpus`, "
        "`memory_gb`, `disk_gb`, `storage_gb`, `test_sandboxes`, `snapshots`, `snapshot_gb`, "
        "`test_snapshots`.",
    )
    workspaces: WorkspaceSettings = WorkspaceSettings()
    cluster: ClusterSettings = ClusterSettings()
    log: LogSettings = LogSettings()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.absolute()

    @model_validator(mode="after")
    def _known_plan(self) -> Self:
        if self.accounts.default_plan not in self.plans:
            raise ValueError(
                f"accounts.default_plan is {self.accounts.default_plan!r}, and plans has no such"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """See pydantic-settings: the order in which sources are asked."""
        home = Path(os.environ.get("SANDYARD_HOME", DEFAULT_HOME))
        file = TomlConfigSettingsSource(settings_cls, home / "config.toml")
        return init_settings, env_settings, file

    @property
    def store_url(self) -> str:
        """The database's URL."""
        if self.store.url is not None:
            return self.store.url.get_secret_value()
        return f"sqlite:///{self.home / 'sandyard.db'}"

    @property
    def workspaces_dir(self) -> Path:
        """Where the volumes of workspaces are."""
        return self.workspaces.folder or self.home / "workspaces"

    @property
    def kernel(self) -> Path | None:
        """The kernel for all templates; a relative path is one in the home."""
        return None if self.node.kernel is None else self.home / self.node.kernel

    @property
    def kernel_modules(self) -> Path | None:
        """The folder of its modules, likewise."""
        return None if self.node.kernel_modules is None else self.home / self.node.kernel_modules

    @property
    def images_dir(self) -> Path:
        """Where built images are kept."""
        return self.node.images_dir or self.home / "images"

    @property
    def cache_dir(self) -> Path:
        """Where package archives are kept."""
        return self.node.cache_dir or self.home / "cache"

    @property
    def templates_dir(self) -> Path:
        """Where template definitions are."""
        if self.node.templates_dir is not None:
            return self.node.templates_dir
        beside_source = Path(__file__).parents[4] / "templates"
        installed = Path(sys.prefix) / "share/sandyard/templates"
        return beside_source if beside_source.is_dir() else installed
