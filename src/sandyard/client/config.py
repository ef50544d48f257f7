"""The server's URL and the API key, and where they are configured."""

import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from sandyard.client.errors import SandyardError


class ConfigError(SandyardError):
    """The configuration is missing or cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ClientConfig:
    """The server's URL and the API key."""

    url: str
    api_key: str = field(repr=False)


def config_path() -> Path:
    """Return the path of the configuration file."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "sandyard" / "config.toml"


def read_config() -> ClientConfig | None:
    """Return the configuration. SANDYARD_URL and SANDYARD_API_KEY override the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    given = os.environ.get("SANDYARD_URL"), os.environ.get("SANDYARD_API_KEY")
    kept = {} if all(given) else _kept()
    url, key = given[0] or kept.get("url"), given[1] or kept.get("api_key")
    return ClientConfig(str(url), str(key)) if url and key else None


def find_config(api_key: str | None, base_url: str | None) -> ClientConfig:
    """Return the given values, completed from the configuration.

    Raises:
        ConfigError: no server or no key is configured.
    """
    if api_key is not None and base_url is not None:
        return _checked(base_url, api_key)
    known = read_config()
    if known is None and api_key is None:
        raise ConfigError(
            "no server is configured; run scripts/up, or set SANDYARD_URL and SANDYARD_API_KEY"
        )
    url = base_url or (known.url if known else None) or os.environ.get("SANDYARD_URL")
    key = api_key if api_key is not None else (known.api_key if known else None)
    if url is None or key is None:
        raise ConfigError("no server is configured; set SANDYARD_URL, or give its URL")
    return _checked(url, key)


def write_config(config: ClientConfig) -> Path:
    """Save URL and key in a file that only this user can read, and return its path."""
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        # A basic string of TOML is one of JSON.
        file.write(f"url = {json.dumps(config.url)}\napi_key = {json.dumps(config.api_key)}\n")
    part.replace(path)
    return path


def _kept() -> dict[str, object]:
    path = config_path()
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}; mend it, or remove it and run scripts/up"
        ) from error


def _checked(url: str, key: str) -> ClientConfig:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"cannot use the URL {url!r}: it is like http://127.0.0.1:8080")
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError("cannot use the API key: it is like rt_live_…")
    return ClientConfig(url.rstrip("/").removesuffix("/v1"), key)
