"""All settings, read once.

A value comes from the first of: command arguments, the environment (`SANDYARD_…`, with two
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
from typing_extensions import override

from sandyard.server.node.images.definitions import ARGUMENTS_ARE, is_command_line

DEFAULT_HOME = Path("/var/lib/sandyard")
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = rf"{_LABEL}(\.{_LABEL})*(:[1-9][0-9]{{0,4}})?"
_HOST = r"^[A-Za-z0-9][A-Za-z0-9.:-]*$"


class Section(BaseModel):
    """Base of the sections. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_domain(domain: str | None) -> str | None:
    if domain is not None and not re.fullmatch(_DOMAIN, domain):
        raise ValueError("it must be a domain in lower case, such as preview.example.org")
    return domain


class HttpSettings(Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8080, ge=1, le=65535, description="The port to listen on.")
    metrics_token: SecretStr | None = Field(
        None,
        min_length=1,
        description="The Bearer token that /metrics requires. Default: none, and only loopback "
        "clients may read it.",
    )

    connections: int = Field(
        4096,
        ge=16,
        le=1_000_000,
        description="The most connections open at one time, and never more than half of the "
        "file descriptors.",
    )
    connections_per_address: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="The most connections from one IPv4 address or IPv6 /64. Raise it behind a "
        "proxy.",
    )
    hosts: tuple[str, ...] = Field(
        (),
        description="Host names that the API answers to, in addition to IP addresses and "
        "`localhost`. Requests for other names get 421. Default: every name outside"
        " the preview domain.",
    )
    trusted_proxies: tuple[IPvAnyNetwork, ...] = Field(
        (),
        description="Addresses or networks of proxies whose X-Forwarded-For and "
        "X-Forwarded-Proto are trusted, such as `127.0.0.1`. Default: none.",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="Origins whose pages may call the API from a browser, such as "
        "`https://app.example.org`, or `*`.",
    )

    public_url: str | None = Field(
        None,
        description="The URL under which clients reach this server, such as "
        "`https://sandyard.example.org`. Default: the address and port that it "
        "listens on.",
    )
    public_ip: str | None = Field(
        None, description="The host's public address, shown in sandboxes as `publicIp`."
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

    enabled: bool = Field(True, description="Whether to run the SSH gateway.")
    host: str | None = Field(None, description="The address to listen on. Default: `http.host`.")
    port: int = Field(2222, ge=1, le=65535, description="The port to listen on.")
    public_host: str | None = Field(
        None,
        pattern=_HOST,
        description="The host name shown to clients. Default: the host of `http.public_url`, "
        "else the address that it listens on.",
    )
    public_port: int | None = Field(
        None, ge=1, le=65535, description="The port shown to clients. Default: `ssh.port`."
    )
    connections: int = Field(
        1000, ge=1, le=100_000, description="The most connections open at one time."
    )
    connections_per_address: int = Field(
        200, ge=1, le=100_000, description="The most connections from one address."
    )


class PreviewSettings(Section):
    """Preview URLs."""

    domain: str | None = Field(
        None,
        description="The domain of preview host names, with the port if it is not 80 or 443. "
        "Wildcard DNS (`*.domain`) must lead to this server. Default: "
        "`preview.localhost` and the server's port.",
    )
    scheme: Literal["http", "https"] = Field(
        "http", description="`https` if a proxy in front, or `preview.port`, terminates TLS."
    )
    token_s: int = Field(
        3600,
        ge=60,
        le=30 * 86_400,
        description="The lifetime of preview URLs in seconds, unless a `ttl` is given.",
    )
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="A separate port for previews, on the same address. Default: none; previews"
        " share `http.port`.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="A certificate chain for `*.domain` (PEM), with which `preview.port` serves"
        " TLS.",
    )
    tls_key: Path | None = Field(None, description="The certificate's private key (PEM).")

    @field_validator("domain")
    @classmethod
    def _is_a_domain(cls, domain: str | None) -> str | None:
        return _checked_domain(domain)

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        _check_own_port("preview", self)
        return self


class E2bSettings(Section):
    """The E2B API."""

    enabled: bool = Field(True, description="Whether the E2B API is served.")
    domain: str | None = Field(
        None,
        description="The domain of the E2B API, with the port if it is not 443, which clients have "
        "as `E2B_DOMAIN`: they find the API at `api.DOMAIN` and sandboxes below DOMAIN, always by "
        "TLS. Wildcard DNS (`*.domain`) must lead to this server. Default: none; clients set "
        "`E2B_API_URL` and `E2B_SANDBOX_URL` to the server's URL.",
    )
    public_ports: bool = Field(
        True,
        description="Whether ports of sandboxes that were created by the E2B API are open to "
        "everyone below `e2b.domain`, as they are at E2B. Otherwise clients need the sandbox's "
        "traffic token.",
    )
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="A separate port for the E2B API, on the same address. Default: none; it "
        "shares `http.port`.",
    )
    images: dict[str, str] = Field(
        {"e2bdev/base": "e2b-base", "ubuntu": "e2b-base", "debian": "e2b-base"},
        description="Templates that builds use in place of container images, by the images' names "
        "without tags. Other images come from their registries.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="A certificate chain for `*.domain` (PEM), with which `e2b.port` serves TLS.",
    )
    tls_key: Path | None = Field(None, description="The certificate's private key (PEM).")

    @field_validator("domain")
    @classmethod
    def _is_a_domain(cls, domain: str | None) -> str | None:
        return _checked_domain(domain)

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        _check_own_port("e2b", self)
        return self


def _check_own_port(name: str, section: PreviewSettings | E2bSettings) -> None:
    if (section.tls_certificate is None) != (section.tls_key is None):
        raise ValueError("tls_certificate and tls_key go together")
    if section.tls_certificate is not None and section.port is None:
        raise ValueError(f"tls_certificate is for a port of its own: set {name}.port as well")


class StoreSettings(Section):
    """The database."""

    url: SecretStr | None = Field(
        None,
        description="`sqlite:///PATH` or `postgresql://…`; default: `sandyard.db` in the home.",
    )


class FirecrackerSettings(Section):
    """Firecracker, on hosts where KVM works."""

    binary: str | None = Field(
        None,
        description="The Firecracker program. Default: the one on PATH, else the one that "
        "`sandyard setup firecracker` installed.",
    )
    jailer: str | None = Field(None, description="The jailer program. Default: likewise.")
    disk_mib_per_s: int = Field(
        0,
        ge=0,
        le=1024 * 1024,
        description="Disk throughput limit of each disk of a machine, in MiB/s. 0: unlimited.",
    )
    network_mib_per_s: int = Field(
        0,
        ge=0,
        le=1024 * 1024,
        description="Network throughput limit of a machine, in MiB/s "
        "for each direction. 0: unlimited.",
    )


class NodeSettings(Section):
    """The host's machines."""

    driver: Literal["auto", "firecracker", "qemu-kvm", "qemu-tcg", "fake"] = Field(
        "auto", description="`auto` selects the fastest hypervisor that boots a probe machine."
    )
    qemu_binary: str = Field("qemu-system-x86_64", description="The QEMU program.")
    kept_qemu_binaries: list[str] = Field(
        [],
        description="QEMU programs of other versions, which resume what they saved: a saved "
        "sandbox needs the version that saved it.",
    )
    tb_size_mib: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="The cache for translated code of an emulated machine, in MiB. Default: a "
        "quarter of its memory, between 128 and 256.",
    )
    templates_dir: Path | None = Field(
        None, description="The directory of template definitions. Default: those of this version."
    )
    kernel: Path | None = Field(
        None,
        description="A custom kernel for all templates, a bzImage or an ELF `vmlinux`, instead "
        "of the distribution's. It takes effect when a template is built; see the "
        "how-to on kernels.",
    )
    kernel_modules: Path | None = Field(
        None,
        description="The directory of the kernel's modules, such as `/lib/modules/6.12.0`. "
        "Default: none; everything that machines need is built in.",
    )
    kernel_arguments: str = Field(
        "",
        description="Additional kernel command-line arguments. They take effect when a template"
        " is built.",
    )
    extra_ca: Path | None = Field(
        None,
        description="A file of CA certificates (PEM) that sandboxes trust in addition, for "
        "hosts behind TLS inspection. It takes effect when a template is built. The server "
        "also uses it to verify the hosts in `inject` and `inspect` of network rules; for these, "
        "it takes effect when the server starts.",
    )
    build_network: Literal["own", "host"] = Field(
        "own",
        description="The network of template builds. `own`: a separate namespace that reaches "
        "what the host reaches, except its loopback addresses. `host`: the host's "
        "network, for an apt proxy on a loopback address.",
    )
    images_dir: Path | None = Field(
        None, description="The directory of built images. Default: `images` in the home."
    )
    cache_dir: Path | None = Field(
        None, description="The directory of cached packages. Default: `cache` in the home."
    )
    subnet: IPv4Network | None = Field(
        None, description="A private /20 network for slots. Default: a free one in 10.200.0.0/14."
    )
    allow: tuple[IPv4Network, ...] = Field(
        (), description="Private networks that sandboxes may reach. All others are blocked."
    )
    dns: tuple[IPvAnyAddress, ...] = Field(
        (),
        description="DNS servers for sandboxes. Default: the host's own, which also resolve "
        "names of the host's private network; the addresses stay unreachable. To "
        "keep such names private, use public servers.",
    )
    probe_s: float = Field(
        20,
        gt=0,
        le=3600,
        description="The time limit for a probe machine to start, in seconds; six times that "
        "with a custom kernel. After it, the hypervisor is not used.",
    )
    slowest: float = Field(
        20,
        ge=1,
        le=100,
        description="The most by which time limits for guests are multiplied on a slow host. "
        "The probe machine measures how slow it is. 1: never.",
    )
    boot_s: float = Field(
        120,
        gt=0,
        description="The time limit for a machine to start, in seconds, on a host "
        "where a probe machine starts in 5 s.",
    )
    no_progress_s: float = Field(
        25,
        gt=0,
        description="Seconds without console output after which a boot is retried, on such a host.",
    )
    golden_machines: bool = Field(
        True,
        description="Whether to start sandboxes from saved machines. If false, each is "
        "cold-booted, and there is no pool.",
    )
    odd_goldens_mib: int = Field(
        2048,
        ge=0,
        description="Disk space in MiB for saved machines of non-default shapes. The least "
        "recently used are evicted.",
    )
    boots_at_once: int = Field(2, ge=1, description="How many machines boot concurrently.")
    restores_at_once: int = Field(
        4, ge=1, description="How many machines are restored concurrently."
    )
    heartbeat_s: float = Field(5, gt=0, description="Seconds between health checks of an agent.")
    memory_floor_mib: int = Field(
        1024,
        ge=0,
        description="Memory in MiB that is kept free on the host. Creates that "
        "would need it fail with no_capacity.",
    )
    disk_floor_mib: int = Field(
        1024,
        ge=0,
        description="Disk space in MiB that is kept free on the host. Creates that "
        "would need it fail with no_capacity.",
    )
    memory_overcommit: float = Field(
        3.0,
        ge=0.1,
        description="How many times the host's memory may be allocated to machines. Under "
        "memory pressure the least recently used are paused.",
    )
    disk_overcommit: float = Field(
        20.0,
        ge=0.1,
        description="How many times the free disk space may be allocated. When the disk is "
        "full, machines are stopped until there is space.",
    )
    disk_reserve_mib: int = Field(
        256,
        ge=0,
        description="How much of the free disk space is reserved at most for what one machine may "
        "still write. A machine whose whole disk exceeds the allocatable space is refused.",
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
    """The pool of running machines that wait for sandboxes."""

    floor: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="The minimum number of waiting machines for each template's default shape. "
        "Default: by the host's memory and processors.",
    )
    ceiling: int = Field(
        10,
        ge=0,
        le=1000,
        description="The maximum number of waiting machines for one shape. 0: no pool.",
    )
    versions: int = Field(
        1,
        ge=0,
        le=1000,
        description="The maximum number of waiting machines for one version of an organization's "
        "template. They are counted in `sandyard_pool_versions`, and not charged.",
    )
    demand_window_s: float = Field(
        60, gt=0, description="How long a create adds one machine to the target, in seconds."
    )


class AccountSettings(Section):
    """Organizations and users."""

    default_plan: str = Field(
        "enterprise", description="The plan of new organizations. See `plans`."
    )
    organizations_per_user: int = Field(
        5,
        ge=1,
        le=10_000,
        description="A user in fewer organizations than this may create another.",
    )
    failed_logins_per_minute: int = Field(
        30, ge=1, description="How many invalid credentials an address may try per minute."
    )


class SessionSettings(Section):
    """Session tokens of an identity provider; without one, API keys only."""

    provider: Literal["workos", "oidc"] | None = Field(
        None, description="`workos`, or `oidc` for any other OpenID Connect provider."
    )
    client_id: str | None = Field(
        None, description="WorkOS: the client id. The signing keys are discovered."
    )
    issuer: str | None = Field(
        None,
        description="The required issuer of tokens. `oidc`: exact. `workos`: a prefix, by "
        "default `https://api.workos.com/`.",
    )
    jwks_url: str | None = Field(
        None, description="The URL of the provider's keys. Default: discovered."
    )
    audience: str | None = Field(
        None, description="The required audience (`aud`) of tokens. Mandatory for `oidc`."
    )
    algorithms: tuple[Literal["RS256", "ES256"], ...] = Field(
        ("RS256",), min_length=1, description="The accepted signature algorithms."
    )
    skew_s: int = Field(30, ge=0, le=300, description="The tolerated clock difference in seconds.")
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
    """Tell whether a URL is protected against changes in transit."""
    parsed = urlsplit(url)
    is_local = parsed.hostname in ("127.0.0.1", "::1", "localhost") and parsed.username is None
    return parsed.scheme == "https" or (parsed.scheme == "http" and is_local)


class PriceSettings(Section):
    """Prices in cents, with up to six decimals."""

    vcpu_hour: Decimal = Field(
        Decimal("5"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Cents for a vCPU for an hour.",
    )
    memory_gib_hour: Decimal = Field(
        Decimal("1.5"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Cents for a GiB of memory for an hour.",
    )
    disk_gib_month: Decimal = Field(
        Decimal("10"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Cents for a GiB of a running sandbox's disk for a month of 730 hours.",
    )
    storage_gib_month: Decimal = Field(
        Decimal("10"),
        ge=0,
        le=1_000_000,
        decimal_places=6,
        description="Cents for a GiB of stored data (paused sandboxes, snapshots, workspaces) "
        "for a month of 730 hours.",
    )


class BillingSettings(Section):
    """Credits."""

    enforce: bool = Field(
        True,
        description="Whether to refuse creates without credits and to pause sandboxes when "
        "credits run out. If false, usage is only recorded.",
    )
    sign_up_cents: int = Field(
        10_000, ge=0, le=10**12, description="Credits for a user's first organization, in cents."
    )
    prices: PriceSettings = PriceSettings()
    stripe_secret: SecretStr | None = Field(
        None,
        description="Stripe's secret key. Default: none, and credits cannot be bought by card.",
    )
    stripe_webhook_secret: SecretStr | None = Field(
        None, description="The signing secret of Stripe's webhook. See the how-to on teams."
    )
    stripe_api: str | None = Field(
        None, description="An alternative URL of Stripe's API, for tests."
    )
    currency: str = Field("usd", pattern=r"^[a-z]{3}$", description="The currency.")


class PlanSettings(Section):
    """The limits of a plan; an omitted one is unlimited."""

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
    templates: int | None = Field(None, ge=0, description="Of the organization's own.")
    template_versions: int | None = Field(None, ge=0, description="Of all its templates.")
    template_gb: int | None = Field(None, ge=0, description="Of all versions together.")
    builds: int | None = Field(2, ge=0, description="Builds in progress; others wait.")


class WorkspaceSettings(Section):
    """Workspaces, directories that outlive sandboxes."""

    quota_mib: int = Field(
        10_240, ge=16, le=2**24, description="The size limit of new workspaces in MiB."
    )
    upload_mib: int = Field(100, ge=1, le=2**20, description="The size limit of one upload in MiB.")
    volumes: Literal["auto", "images", "folders"] = Field(
        "auto",
        description="How workspaces are stored. `images`: each in its own file system, which "
        "enforces its size. `folders`: directories, for a mount that several "
        "servers share. `auto`: images where they can be mounted.",
    )
    folder: Path | None = Field(
        None, description="The directory of workspaces. Default: `workspaces` in the home."
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


class BuildSettings(Section):
    """Builds of templates that users request."""

    at_once: int = Field(
        2, ge=1, le=100, description="How many builds a server carries out at one time."
    )
    limit_s: int = Field(
        3600, ge=60, le=86_400, description="How long a build may take, in seconds."
    )
    log_kib: int = Field(2048, ge=16, le=65_536, description="The size limit of a log in KiB.")
    size_mib: int = Field(
        10_240, ge=16, le=2**20, description="The size limit of a template's files in MiB."
    )
    upload_mib: int = Field(
        10_240, ge=1, le=2**20, description="The size limit of one upload in MiB."
    )
    cache_mib: int = Field(
        5120,
        ge=0,
        le=2**24,
        description="The size limit of what the builds of one user keep for later ones, in MiB; "
        "0 keeps nothing.",
    )
    vcpus: int = Field(
        2, ge=1, le=64, description="The processors of the machine that unpacks images."
    )
    memory_mib: int = Field(2048, ge=512, le=2**20, description="Its memory in MiB.")
    disk_mib: int = Field(
        20_480,
        ge=2048,
        le=2**24,
        description="Its disk in MiB, which limits what an image may unpack to: it holds the "
        "image, its files, and the packed result.",
    )


class ClusterSettings(Section):
    """Several hosts: `sandyard control` and `sandyard node`. Not used on a single machine."""

    nats: tuple[str, ...] = Field(
        (),
        description="Control planes: the URLs of the NATS servers, as control planes and nodes "
        'reach them, such as `["tls://10.0.0.5:4222"]`.',
    )
    host: str = Field(
        "0.0.0.0",  # noqa: S104 - both ends of what listens here show certificates
        description="The address to listen on. Control planes listen for nodes that join, nodes"
        " for control planes.",
    )
    port: int = Field(8700, ge=1, le=65535, description="The port to listen on, TCP with TLS.")
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Nodes: the port for the node's own /metrics. With an `http.metrics_token` "
        "it is on `cluster.host`, else on this host alone; `http.host` overrides both. Default: "
        "none.",
    )
    address: str | None = Field(
        None,
        pattern=_HOST,
        description="The address by which other hosts reach this one. Default: for a control "
        "plane its host name, for a node the address from which it joined.",
    )
    drain_s: float = Field(
        2.0,
        ge=0,
        le=45,
        description="Control planes: for how many seconds one that is stopped keeps serving "
        "while `/servez` tells load balancers to send no more requests.",
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


class BackupSettings(Section):
    """Scheduled backups; see docs/howto/backup.md."""

    folder: Path | None = Field(None, description="Where to. Without it, there are none.")
    passphrase_file: Path | None = Field(
        None, description="A file with the passphrase. Keep a copy of it elsewhere."
    )
    every_h: float = Field(24, gt=0, le=24 * 365, description="Hours between two backups.")
    keep: int = Field(7, ge=1, le=10_000, description="How many are kept; older ones are removed.")
    include: tuple[Literal["paused", "snapshots", "workspaces", "templates"], ...] = Field(
        (),
        description="What else is in them: files of paused sandboxes, snapshots, workspaces, and "
        "templates that users built.",
    )
    quarantine_days: float = Field(
        7,
        ge=0,
        le=3650,
        description="How long machines and snapshots are kept that a restored database does not "
        "know; 0: until they are deleted by hand.",
    )

    @model_validator(mode="after")
    def _has_passphrase(self) -> Self:
        if self.folder is not None and self.passphrase_file is None:
            raise ValueError("backup.folder needs backup.passphrase_file")
        return self


class LogSettings(Section):
    """The log: on standard error, or in a file that is rotated."""

    file: Path | None = Field(
        None,
        description="The log file. Default: standard error; `scripts/up` sets "
        "`server.log` in the home.",
    )
    file_mib: int = Field(
        32,
        ge=1,
        le=10_240,
        description="The size in MiB at which the log file is rotated. Three old files are kept.",
    )

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The minimum severity."
    )
    format: Literal["auto", "text", "json"] = Field(
        "auto", description="`auto`: text on a terminal, JSON lines otherwise."
    )


class Settings(BaseSettings):
    """All settings."""

    model_config = SettingsConfigDict(
        env_prefix="SANDYARD_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
    )

    home: Path = Field(DEFAULT_HOME, description="The directory of the installation's state.")
    http: HttpSettings = HttpSettings()
    ssh: SshSettings = SshSettings()
    preview: PreviewSettings = PreviewSettings()
    e2b: E2bSettings = E2bSettings()
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
                requests_per_minute=60,
                storage_gb=10,
                snapshots=10,
                snapshot_gb=10,
                templates=10,
                template_versions=50,
                template_gb=10,
            ),
            "pro": PlanSettings(
                requests_per_minute=300,
                storage_gb=50,
                snapshots=100,
                snapshot_gb=100,
                templates=100,
                template_versions=500,
                template_gb=50,
            ),
            "team": PlanSettings(
                requests_per_minute=1000,
                storage_gb=500,
                snapshots=1000,
                snapshot_gb=1000,
                templates=1000,
                template_versions=5000,
                template_gb=500,
            ),
            "enterprise": PlanSettings(),
        },
        description="Plans by name, each a table: `requests_per_minute`, `sandboxes`, `vcpus`, "
        "`memory_gb`, `disk_gb`, `storage_gb`, `test_sandboxes`, `snapshots`, `snapshot_gb`, "
        "`test_snapshots`, `templates`, `template_versions`, `template_gb`, `builds`.",
    )
    workspaces: WorkspaceSettings = WorkspaceSettings()
    builds: BuildSettings = BuildSettings()
    cluster: ClusterSettings = ClusterSettings()
    backup: BackupSettings = BackupSettings()
    log: LogSettings = LogSettings()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.absolute()

    @model_validator(mode="after")
    def _has_its_files(self) -> Self:
        if self.backup.include and self.cluster.nats:
            raise ValueError(
                "backup.include needs an installation on one machine: with cluster.nats, machines "
                "and workspaces are on other hosts"
            )
        return self

    @model_validator(mode="after")
    def _known_plan(self) -> Self:
        if self.accounts.default_plan not in self.plans:
            raise ValueError(
                f"accounts.default_plan is {self.accounts.default_plan!r}, and plans has no such"
            )
        return self

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of settings, in order of precedence."""
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
        """The directory of workspaces."""
        return self.workspaces.folder or self.home / "workspaces"

    @property
    def kernel(self) -> Path | None:
        """The kernel for all templates. A relative path is below the home."""
        return None if self.node.kernel is None else self.home / self.node.kernel

    @property
    def kernel_modules(self) -> Path | None:
        """The directory of its modules, likewise."""
        return None if self.node.kernel_modules is None else self.home / self.node.kernel_modules

    @property
    def images_dir(self) -> Path:
        """The directory of built images."""
        return self.node.images_dir or self.home / "images"

    @property
    def cache_dir(self) -> Path:
        """The directory of cached packages."""
        return self.node.cache_dir or self.home / "cache"

    @property
    def templates_dir(self) -> Path:
        """The directory of template definitions."""
        if self.node.templates_dir is not None:
            return self.node.templates_dir
        beside_source = Path(__file__).parents[4] / "templates"
        installed = Path(sys.prefix) / "share/sandyard/templates"
        return beside_source if beside_source.is_dir() else installed
