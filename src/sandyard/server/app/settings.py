"""All settings, in one place, read once.

A value comes from, first to last: what a command was given, the environment (`SANDYARD_…`, two
underscores between section and name), `config.toml` in the installation's home, the default.
"""

import os
import sys
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

DEFAULT_HOME = Path("/var/lib/sandyard")


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
    tb_size_mib: int = Field(
        64, ge=16, le=1024, description="MiB of translated code a machine may keep (TCG)."
    )
    templates_dir: Path | None = Field(
        None, description="Where template definitions are; default: those of this version."
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
    boot_s: float = Field(120, gt=0, description="Seconds a machine may take to start.")
    no_progress_s: float = Field(
        25, gt=0, description="Seconds of a silent console after which a boot is tried again."
    )
    golden_machines: bool = Field(
        True,
        description="Start sandboxes from saved machines; false boots each from cold, and there "
        "is no pool.",
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

    @field_validator("subnet")
    @classmethod
    def _large_enough(cls, subnet: IPv4Network | None) -> IPv4Network | None:
        if subnet is not None and (subnet.prefixlen > 20 or not subnet.is_private):
            raise ValueError("it must be a private network of at least 4096 addresses (a /20)")
        return subnet


class PoolSettings(Section):
    """Machines that wait, running, for whoever creates a sandbox."""

    floor: int = Field(
        2, ge=0, le=1000, description="How many always wait for each template's default shape."
    )
    ceiling: int = Field(
        10, ge=0, le=1000, description="How many wait at most for one shape; 0: none ever."
    )
    demand_window_s: float = Field(
        60, gt=0, description="Seconds for which a create keeps one more waiting."
    )


class LogSettings(Section):
    """The log, on standard error."""

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
    store: StoreSettings = StoreSettings()
    node: NodeSettings = NodeSettings()
    firecracker: FirecrackerSettings = FirecrackerSettings()
    pool: PoolSettings = PoolSettings()
    log: LogSettings = LogSettings()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.absolute()

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
