"""The server's URL and the API key, and where they are configured."""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandyard.client.errors import SandyardError

_PROFILE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_Section = Mapping[str, object]


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


def read_config(profile: str | None = None) -> ClientConfig | None:
    """Return the configuration of a profile, or None if there is none.

    Without a `profile` it is that of SANDYARD_PROFILE, or else the one without a name, and
    SANDYARD_URL and SANDYARD_API_KEY override it.

    Raises:
        ConfigError: the file cannot be read, or has no such profile.
    """
    names = ("SANDYARD_URL", "SANDYARD_API_KEY")
    given = [None if profile else os.environ.get(name) for name in names]
    kept = {} if all(given) else _section(_kept(), profile or _usual_profile())
    url, key = given[0] or kept.get("url"), given[1] or kept.get("api_key")
    return ClientConfig(str(url), str(key)) if url and key else None


def known_key(url: str) -> str | None:
    """Return the API key that a profile has for a server.

    Raises:
        ConfigError: the file cannot be read.
    """
    kept = _kept()
    sections = (kept, *_profiles(kept).values())
    return next((str(one.get("api_key")) for one in sections if one.get("url") == url), None)


def find_config(
    api_key: str | None, base_url: str | None, profile: str | None = None
) -> ClientConfig:
    """Return the given values, completed from the configuration.

    Raises:
        ConfigError: no server or no key is configured.
    """
    if api_key is not None and base_url is not None:
        return _checked(base_url, api_key)
    known = read_config(profile)
    if known is None and api_key is None:
        raise ConfigError(
            "no server is configured; run scripts/up, or set SANDYARD_URL and SANDYARD_API_KEY"
        )
    url = base_url or (known.url if known else None) or os.environ.get("SANDYARD_URL")
    key = api_key if api_key is not None else (known.api_key if known else None)
    if url is None or key is None:
        raise ConfigError("no server is configured; set SANDYARD_URL, or give its URL")
    return _checked(url, key)


def write_config(config: ClientConfig) -> Path | None:
    """Save URL and key in the profile in use, in a file that only this user can read.

    If that replaces another server or key, return the path of a copy of the file as it was before;
    otherwise None.

    Raises:
        ConfigError: the name of the profile is invalid.
    """
    profile = _usual_profile()
    try:
        kept = _kept()
    except ConfigError:
        kept, is_replaced = {}, True
    else:
        before = kept if profile is None else _profiles(kept).get(profile, {})
        known = (before.get("url"), before.get("api_key"))
        is_replaced = any(known) and known != (config.url, config.api_key)
    copy = _copied() if is_replaced else None
    _write(kept, profile, {"url": config.url, "api_key": config.api_key})
    return copy


def remove_config() -> None:
    """Remove URL and key of the profile in use; without others, remove the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    _write(_kept(), _usual_profile(), {})


def _usual_profile() -> str | None:
    """Return the name of the profile in use; None is the one without a name."""
    profile = os.environ.get("SANDYARD_PROFILE") or None
    if profile is not None and not _PROFILE.fullmatch(profile):
        raise ConfigError(
            f"cannot use the profile {profile!r}: its name has letters, digits, - and _, 64 at most"
        )
    return profile


def _section(kept: _Section, profile: str | None) -> _Section:
    if profile is None:
        return kept
    found = _profiles(kept).get(profile)
    if found is None:
        raise ConfigError(
            f"there is no profile {profile!r} in {config_path()}; `sandyard --profile {profile} "
            "login` adds it"
        )
    return found


def _profiles(kept: _Section) -> dict[str, _Section]:
    found = kept.get("profiles")
    every = found.items() if isinstance(found, dict) else ()
    return {name: one for name, one in every if isinstance(one, dict)}


def _copied() -> Path:
    """Keep the file under another name, too, and return its path."""
    path = config_path()
    copy = path.with_name(path.name + ".bak")
    copy.unlink(missing_ok=True)
    os.link(path, copy)
    return copy


def _write(kept: _Section, profile: str | None, section: _Section) -> None:
    """Write the file with one section replaced."""
    profiles = _profiles(kept)
    usual = {name: kept[name] for name in ("url", "api_key") if name in kept}
    if profile is None:
        usual = dict(section)
    else:
        profiles = {**profiles, profile: section}
    profiles = {name: one for name, one in profiles.items() if one}
    path = config_path()
    if not usual and not profiles:
        path.unlink(missing_ok=True)
        return
    lines = _lines(usual)
    for name, one in profiles.items():
        lines += ["", f"[profiles.{name}]", *_lines(one)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines).lstrip("\n") + "\n")
    part.replace(path)


def _lines(section: _Section) -> list[str]:
    # A basic string of TOML is one of JSON.
    return [f"{name} = {json.dumps(str(value))}" for name, value in section.items()]


def _kept() -> dict[str, object]:
    path = config_path()
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}; repair it, or remove it and run scripts/up"
        ) from error


def _checked(url: str, key: str) -> ClientConfig:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"cannot use the URL {url!r}: expected something like http://127.0.0.1:8080"
        )
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError("cannot use the API key: expected something like rt_live_…")
    return ClientConfig(url.rstrip("/").removesuffix("/v1"), key)
