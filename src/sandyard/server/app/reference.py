"""Generates reference pages from the code; a test fails when they are out of date."""

import inspect
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Literal

from fastapi.routing import APIRoute, APIWebSocketRoute
from pydantic import BaseModel
from pydantic_settings import BaseSettings
from starlette.routing import BaseRoute

from sandyard.server.api.access import Scope
from sandyard.server.api.http import ROUTES, description
from sandyard.server.api.routes.common import COMMON
from sandyard.server.app.settings import Settings
from sandyard.server.core import errors
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.scopes import SCOPES
from sandyard.server.front.bodies import BODY_MAX
from sandyard.server.front.status import STATUS

_MADE = "<!-- Made from the code by `python -m sandyard.server.app.reference`; do not edit. -->\n"


def settings_page() -> str:
    """Return the page of all settings."""
    lines = [
        "# Settings\n", _MADE,
        "A value comes from, first to last: the environment, `config.toml` in the home, the "
        "default. In `config.toml` a section is a table: `[http]`, then `port = 8081`. A key that "
        "is not known is an error. In the environment, lists and tables are JSON.\n",
        "| Environment | Values | Default | Meaning |",
        "|---|---|---|---|",
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
            default = "" if field.default in (None, "") else f"`{_shown(field.default)}`"
            values = _values(field.annotation, field.metadata)
            rows.append(
                f"| `{prefix}{name.upper()}` | {values} | {default} | {field.description} |"
            )
    return rows


def _shown(default: object) -> str:
    """Return a default as it is written in `config.toml`."""
    if isinstance(default, dict):
        return ", ".join(default)
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return json.dumps(default)
    return str(default)


def _values(kind: object, bounds: Sequence[object] = ()) -> str:
    """Return which values a setting of a type may have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _values(next(one for one in arguments if one is not type(None)), bounds)
    if origin is Annotated:
        return _values(arguments[0], arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin in (tuple, list, Sequence):
        return f"a list of {_values(arguments[0])}"
    if origin in (dict, Mapping):
        return "a table"
    if kind is bool:
        return "`true`, `false`"
    if kind in (int, float, Decimal):
        return " ".join(["a whole number" if kind is int else "a number", *_bounds(bounds)])
    return "a path" if kind is Path else "text"


def _bounds(bounds: Sequence[object]) -> list[str]:
    """Return a number's bounds in words."""
    words = {"ge": "from", "gt": "over", "le": "to", "lt": "under"}
    return [
        f"{word} {getattr(one, name)}"
        for name, word in words.items()
        for one in bounds
        if getattr(one, name, None) is not None
    ]


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
        if issubclass(kind, SandyardError) and "code" in vars(kind)
    ]
    for kind in sorted(found, key=lambda one: (STATUS[one.code], one.code)):
        meaning = (kind.__doc__ or "").splitlines()[0]
        again = "yes" if kind.retryable else ""
        lines.append(f"| {STATUS[kind.code]} | `{kind.code}` | {meaning} | {again} |")
    lines.append(
        "\n`unsupported` is shown as `bad_request`, `deadline_exceeded` as `unavailable`, "
        "`limit_reached` as `conflict` with `details.limit`."
    )
    return "\n".join(lines) + "\n"


def scopes_page() -> str:
    """Return the page of all scopes."""
    lines = [
        "# Scopes\n", _MADE,
        "A key holds a set of these. `family:*` covers the family, `*` covers all but what only an "
        "admin may: seeing other members' sandboxes takes the role `admin`, or `admin:resources` "
        "or `admin:*` by name.\n",
    ]  # fmt: skip
    by_scope: dict[str, list[str]] = {scope: [] for scope in SCOPES}
    anyone: list[str] = []
    for routes in ROUTES:
        for route in routes.router.routes:
            if not isinstance(route, APIRoute) or not route.include_in_schema:
                continue
            for one in route.dependant.dependencies:
                if isinstance(one.call, Scope):
                    shown = [f"`{method} {route.path}`" for method in sorted(route.methods or ())]
                    (anyone if one.call.name is None else by_scope[one.call.name]).extend(shown)
    lines += ["| Scope | What it opens |", "|---|---|"]
    for scope, opened in sorted(by_scope.items()):
        family = scope.removesuffix("*")
        members = [one for one in sorted(SCOPES) if one.startswith(family) and one != scope]
        opens = ", ".join(sorted(opened))
        if scope == "*":
            opens = "everything but `admin:…`"
        elif scope.startswith("admin:"):
            opens = "other members' resources"
        elif scope == "secret:use":
            opens = "`network.inject` with secrets, of sandboxes and builds"
        elif not opened and scope.endswith("*"):
            opens = " ".join(f"`{one}`" for one in members)
        lines.append(f"| `{scope}` | {opens or 'nothing here; kept for other services'} |")
    lines.append(
        f"\nAny credential opens {', '.join(anyone)}. What moves money takes the role `admin` "
        "besides, and `POST /v1/billing/grants` an operator of the installation. Only an admin "
        "grants `admin:…`."
    )
    return "\n".join(lines) + "\n"


def routes_page() -> str:
    """Return the page of all routes."""
    lines = [
        "# Routes\n", _MADE,
        "Every route of the RunTools API, by subject, with the scope that its credential needs, "
        "the largest body it takes, and the errors that it adds to the common ones. Every route "
        f"can answer {', '.join(str(one) for one in sorted(COMMON))}; [errors](errors.md) says "
        "what they mean. Requests are limited per minute by the organization's plan "
        "(`X-RateLimit-Limit`). [`openapi.json`](openapi.json) has the bodies and answers.\n",
    ]  # fmt: skip
    for routes in ROUTES:
        rows = [row for one in routes.router.routes if (row := _route_row(one))]
        if rows:
            subject = str(routes.router.tags[0]).capitalize()
            lines += [f"## {subject}\n", "| Route | Scope | Body | Errors | What it does |",
                      "|---|---|---|---|---|", *rows, ""]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _route_row(route: BaseRoute) -> str | None:
    """Return the row of a route; None for one that is not public."""
    if isinstance(route, APIRoute):
        if not route.include_in_schema:
            return None
        scopes = [one.call for one in route.dependant.dependencies if isinstance(one.call, Scope)]
        scope = f"`{scopes[0].name}`" if scopes and scopes[0].name else "any" if scopes else "none"
        methods = "/".join(sorted(route.methods or ()))
        added = sorted(
            int(one) for one in route.responses if int(one) >= 400 and int(one) not in COMMON
        )
    elif isinstance(route, APIWebSocketRoute):
        methods, added = "WebSocket", []
        scope = f"`{getattr(route.endpoint, 'scope_name', 'any')}`"
        if (kind := getattr(route.endpoint, "ticket_kind", None)) is not None:
            scope = f"a {kind} ticket"
    else:
        return None
    has_body = isinstance(route, APIRoute) and route.body_field is not None
    body = _size(getattr(route.endpoint, "body_max", BODY_MAX)) if has_body else ""
    if getattr(route.endpoint, "streams", False):
        body = "streamed"
    what = " ".join((route.endpoint.__doc__ or "").split("\n\n")[0].split())
    errors_added = ", ".join(str(one) for one in added)
    return f"| `{methods} {route.path}` | {scope} | {body} | {errors_added} | {what} |"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"


def openapi_page() -> str:
    """Return the OpenAPI description of the API."""
    return json.dumps(description(package_version("sandyard")), indent=1, sort_keys=True) + "\n"


PAGES = {
    "settings.md": settings_page,
    "errors.md": errors_page,
    "scopes.md": scopes_page,
    "routes.md": routes_page,
    "openapi.json": openapi_page,
}


def main() -> None:
    """Write the pages into a directory."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
    for name, page in PAGES.items():
        (folder / name).write_text(page())


if __name__ == "__main__":
    main()
