"""Which server the command line talks to, and with which key."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path


class ConfigError(Exception):
    """The configuration is missing or cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ClientConfig:
    """Where the server is and what to show it."""

    url: str
    api_key: str


def config_path() -> Path:
    """Return the file that keeps URL and key."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "sandyard" / "config.toml"


def read_config() -> ClientConfig | None:
    """Return what is configured; SANDYARD_URL and SANDYARD_API_KEY win over the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    kept: dict[str, object] = {}
    path = config_path()
    if path.exists():
        try:
            kept = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read {path}: {error}; mend it, or remove it and run scripts/up"
            ) from error
    url = os.environ.get("SANDYARD_URL") or kept.get("url")
    key = os.environ.get("SANDYARD_API_KEY") or kept.get("api_key")
    return ClientConfig(str(url), str(key)) if url and key else None


def write_config(config: ClientConfig) -> Path:
    """Keep URL and key in a file that only this user may read, and return its path."""
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f'url = "{config.url}"\napi_key = "{config.api_key}"\n')
    part.replace(path)
    return path
