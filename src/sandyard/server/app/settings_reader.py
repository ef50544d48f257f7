"""Reading the settings, and saying what is wrong with them."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from sandyard.server.app.settings import DEFAULT_HOME, Settings
from sandyard.server.core.errors import InvalidArgumentError

_OF_CLIENTS: Final = ("url", "api_key", "profile", "ssh_password", "ssh_prompt", "venv")
"""Variables that clients and scripts read."""
_NEAR: Final = 0.8


def read_settings() -> Settings:
    """Return the settings of this process: `SANDYARD_…` variables before the home's file.

    Raises:
        InvalidArgumentError: some cannot be used; the message names each, and where it is said.
    """
    file = Path(os.environ.get("SANDYARD_HOME", DEFAULT_HOME)) / "config.toml"
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            _problem(one, file) for one in error.errors(include_input=False, include_url=False)
        ]
        raise InvalidArgumentError(f"cannot use the settings: {'; '.join(problems)}") from error
    except SettingsError as error:
        raise InvalidArgumentError(f"cannot use the settings: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(f"cannot read {file}: {error}") from error


def unknown_variables() -> list[str]:
    """Return a sentence for each `SANDYARD_…` variable that nothing reads."""
    known = {*Settings.model_fields, *_OF_CLIENTS}
    found = list[str]()
    for variable in sorted(os.environ):
        name = variable.removeprefix("SANDYARD_").lower()
        if name == variable.lower() or name.startswith("test_") or name.split("__")[0] in known:
            continue
        near = get_close_matches(name.replace("_", "."), _names(Settings), n=1, cutoff=_NEAR)
        hint = f"; did you mean {_variable(near[0].split('.'))}?" if near else ""
        found.append(f"the variable {variable} is unknown and has no effect{hint}")
    return found


def _problem(error: Mapping[str, Any], file: Path) -> str:
    where = [str(one) for one in error["loc"]]
    name, variable = ".".join(where), _variable(where)
    origin = variable if variable in os.environ else f"{name} in {file}" if where else str(file)
    match error:
        case {"type": "extra_forbidden"}:
            near = get_close_matches(name, _names(Settings), n=1, cutoff=_NEAR)
            meant = [_variable(one.split(".")) if origin == variable else one for one in near]
            hint = f"; did you mean {meant[0]}?" if meant else ""
            return f"{origin}: there is no such setting{hint}"
        case {"type": "value_error", "ctx": {"error": cause}}:
            return f"{origin}: {cause}"
        case _:
            text = str(error["msg"])
            return f"{origin}: {text[:1].lower()}{text[1:]}"


def _variable(where: Sequence[str]) -> str:
    return f"SANDYARD_{'__'.join(where)}".upper()


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = list[str]()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += _names(kind, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found
