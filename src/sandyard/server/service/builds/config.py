"""What a container image says of itself, and what a version of a template takes from that.

The image's configuration is a tenant's: it is bounded, and read field by field.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import checked_text
from sandyard.server.core.wire import printable

CONFIG_MAX: Final = 1024 * 1024
_ENV_MAX = 64 * 1024
_WORDS_MAX = 1024
_OS_MAX = 80
_PLATFORM: Final = "linux/amd64"
_NOT_USED: Final = {
    "Volumes": "VOLUME: a sandbox's whole disk is its own and is kept",
    "ExposedPorts": "EXPOSE: every port can be reached by a preview",
    "StopSignal": "STOPSIGNAL: a sandbox is paused or deleted as a whole",
    "OnBuild": "ONBUILD: only a Dockerfile that builds on the image uses it",
    "Shell": "SHELL: it is used during the build only",
}


@dataclass(frozen=True)
class ImageConfig:
    """The configuration of an image. `command` is its entry point with its arguments, `check` its
    health check as a shell command. `ignored` says what it has that is not used, a sentence each.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    command: tuple[str, ...] = ()
    check: str | None = None
    ignored: tuple[str, ...] = ()


def read_config(data: bytes) -> ImageConfig:
    """Return an image's configuration from JSON, in Docker's or OCI's format.

    Raises:
        InvalidArgumentError: it is not valid.
    """
    try:
        whole = json.loads(data)
        whole = whole.get("Docker", whole)  # as buildah tells it
        config = whole.get("config") or {}
        if not isinstance(config, dict):
            raise TypeError("config is not an object")
        _check_platform(whole)
        entry, arguments = _words(config.get("Entrypoint")), _words(config.get("Cmd"))
        return ImageConfig(
            env=_env(config.get("Env") or []),
            user=_text(config.get("User")),
            workdir=_text(config.get("WorkingDir")),
            command=(*entry, *arguments),
            check=_check_of(config.get("Healthcheck")),
            ignored=tuple(text for name, text in _NOT_USED.items() if config.get(name)),
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(
            f"cannot read the configuration of the image: {printable(str(error)[:200])}"
        ) from error


def _check_platform(whole: Mapping[str, Any]) -> None:
    found = f"{_text(whole.get('os')) or 'linux'}/{_text(whole.get('architecture')) or 'amd64'}"
    if found != _PLATFORM:
        raise InvalidArgumentError(
            f"cannot use the image: it is for {printable(found)[:_OS_MAX]}, and sandboxes need "
            f"{_PLATFORM}; choose or build one for that"
        )


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 4096:
        raise TypeError("a text is missing or too long")
    return checked_text(value, field="image")


def _words(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _WORDS_MAX:
        raise TypeError("a command is not a list, or too long")
    words = tuple(checked_text(str(one), field="image") for one in value)
    if sum(len(one) for one in words) > _ENV_MAX:
        raise TypeError("a command is too long")
    return words


def _env(value: Sequence[Any]) -> dict[str, str]:
    if not isinstance(value, list):
        raise TypeError("Env is not a list")
    found: dict[str, str] = {}
    for one in value:
        name, _, content = str(one).partition("=")
        if name.isidentifier() and name.isascii():  # others no process can be given by us
            found[checked_text(name, field="image")] = checked_text(content, field="image")
    if sum(len(name) + len(one) for name, one in found.items()) > _ENV_MAX:
        raise TypeError("Env is too long")
    return found


def _check_of(value: object) -> str | None:
    test = value.get("Test") if isinstance(value, dict) else None
    words = _words(test)
    match words:
        case ("CMD-SHELL", line):
            return line
        case ("CMD", *rest) if rest:
            return shlex.join(rest)
        case _:
            return None


def os_of(release: bytes) -> str:
    """Return the name of an operating system from its os-release(5), or "Linux"."""
    for line in release.decode(errors="replace").splitlines():
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return printable(value.strip().strip("\"'"))[:_OS_MAX] or "Linux"
    return "Linux"
