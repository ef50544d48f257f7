"""Writes the reference pages that are made from the code; a test fails when they lag."""

import inspect
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic_settings import BaseSettings

from sandyard.server.api.errors import STATUS
from sandyard.server.app.settings import Settings
from sandyard.server.core import errors
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.scopes import SCOPES

_MADE = "<!-- Made from the code by `python -m sandyard.server.app.reference`; do not edit. -->\n"


def settings_page() -> str:
    """Return the page of all settings."""
    lines = [
        "# Settings\n", _MADE,
        "A value comes from, first to last: the environment, `config.toml` in the home, the "
        "default. In `config.toml` a section is a table: `[http]`, then `port = 8081`. A key that "
        "is not known is an error.\n",
        "| Environment | Default | Meaning |",
        "|---|---|---|",
    ]  # fmt: skip
    lines += _rows(Settings, "SANDYARD_")
    return "\n".join(lines) + "\n"


def _rows(model: type[BaseModel | BaseSettings], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            rows += _rows(kind, f"{prefix}{name.upper()}__")
        else:
            default = "" if field.default is None else f"`{field.default}`"
            rows.append(f"| `{prefix}{name.upper()}` | {default} | {field.description} |")
    return rows


def errors_page() -> str:
    """Return the page of all error codes."""
    lines = [
        "# Errors\n", _MADE,
        "Every error comes as `{\"error\": {\"code\", \"message\", \"requestId\", \"details\"}}`. "
        "The message says what was asked, why it is refused and what to do; `details.field` names "
        "the field, `details.status` the sandbox's status, `details.requiredScope` the scope. 429 "
        "and 503 carry `Retry-After`.\n",
        "| HTTP | Code inside | Meaning | Try again |",
        "|---|---|---|---|",
    ]  # fmt: skip
    found = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, SandyardError) and kind is not SandyardError
    ]
    for kind in sorted(found, key=lambda one: (STATUS[one.code], one.code)):
        meaning = (kind.__doc__ or "").splitlines()[0]
        again = "yes" if kind.retryable else ""
        lines.append(f"| {STATUS[kind.code]} | `{kind.code}` | {meaning} | {again} |")
    lines.append("\n`unsupported` is shown as `bad_request`, `deadline_exceeded` as `unavailable`.")
    return "\n".join(lines) + "\n"


def scopes_page() -> str:
    """Return the page of all scopes."""
    lines = [
        "# Scopes\n", _MADE,
        "A key holds a set of these. `family:*` covers the family, `*` covers all but what only an "
        "admin may: seeing other members' sandboxes takes the role `admin`, or `admin:resources` "
        "or `admin:*` by name.\n",
    ]  # fmt: skip
    lines += [f"- `{scope}`" for scope in sorted(SCOPES)]
    return "\n".join(lines) + "\n"


PAGES = {"settings.md": settings_page, "errors.md": errors_page, "scopes.md": scopes_page}


def main() -> None:
    """Write the pages into the folder given."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
    for name, page in PAGES.items():
        (folder / name).write_text(page())


if __name__ == "__main__":
    main()
