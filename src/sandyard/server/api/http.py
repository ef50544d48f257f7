"""The application: its routes behind its edge, described as they are."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from sandyard.server.api.credentials import readers
from sandyard.server.api.errors import answer_error, install_handlers
from sandyard.server.api.routes import (
    activity,
    api_keys,
    billing,
    commands,
    contexts,
    desktops,
    files,
    health,
    network,
    organizations,
    planned,
    processes,
    projects,
    registry_credentials,
    sandboxes,
    secrets,
    snapshots,
    ssh_keys,
    templates,
    ways,
    workspaces,
)
from sandyard.server.api.strictness import strictness
from sandyard.server.front.edge import Edge
from sandyard.server.front.face import EdgeServices, Face
from sandyard.server.service.services import Services

log = logging.getLogger(__name__)

ROUTES = (
    sandboxes, network, secrets, commands, processes, contexts, files, ways, desktops, snapshots,
    organizations, projects, api_keys, ssh_keys, activity, billing, templates,
    registry_credentials, workspaces, health, planned,
)  # fmt: skip
"""What is served, a module a subject."""


_EXPOSED = [
    "X-Request-Id", "Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
]  # fmt: skip


_GUARDED = "/v1"


def _is_guarded(path: str) -> bool:
    return path == _GUARDED or path.startswith(f"{_GUARDED}/")


def make_api(
    services: Services, edge: EdgeServices, *, version: str, cors_origins: Sequence[str] = ()
) -> FastAPI:
    """Return the application. Pages of `cors_origins` may call it from a browser."""
    app = _routed(version)
    app.state.services = services
    app.state.log = log
    install_handlers(app)
    face = Face(
        name="api",
        guards=_is_guarded,
        credentials=readers([one for routes in ROUTES for one in routes.router.routes]),
        render=answer_error,
        json_only=True,
    )
    app.add_middleware(Edge, face=face, services=edge)
    if cors_origins:
        # Outermost: a browser sends OPTIONS first, without a credential.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
            max_age=600,
        )
    return app


def description(version: str) -> dict[str, Any]:
    """Return the OpenAPI description of the API, as `/openapi.json` serves it."""
    return _routed(version).openapi()


def _routed(version: str) -> FastAPI:
    app = FastAPI(
        title="Sandyard",
        version=version,
        description="Real virtual machines for agents and people.",
        redirect_slashes=False,
        docs_url=None,  # see pages.docs
        redoc_url=None,
        dependencies=[Depends(strictness)],
        strict_content_type=False,  # a body without a Content-Type is taken for JSON
    )
    for routes in ROUTES:
        app.include_router(routes.router)
    _describe_truly(app)
    return app


_NO_NUL = r"^[^\x00]*$"
_PATH = {"type": "string", "maxLength": 4096, "pattern": _NO_NUL}
_FILE = {
    "name": "file",
    "in": "query",
    "required": True,
    "style": "form",
    "explode": True,
    "description": "Which file: `path`, below /workspace without / at its beginning; or "
    "`pathBase64`, the same in base64, if it is not UTF-8.",
    "schema": {
        "oneOf": [
            {
                "type": "object",
                "required": [name],
                "properties": {name: schema},
                "additionalProperties": False,
            }
            for name, schema in (
                ("path", {**_PATH, "minLength": 1}),
                ("pathBase64", {"type": "string", "format": "byte", "minLength": 4}),
            )
        ]
    },
}
"""Two parameters of which exactly one is given."""


def _forbid_nul(schema: Any) -> None:
    """Say of all text that it has no U+0000, which no store and no guest can keep."""
    if isinstance(schema, list):
        for one in schema:
            _forbid_nul(one)
    elif isinstance(schema, dict):
        is_known = schema.keys() & {
            "pattern", "enum", "format", "const", "allOf", "contentMediaType"
        }  # fmt: skip
        if schema.get("type") == "string" and not is_known:
            schema["pattern"] = _NO_NUL
        for name, one in schema.items():
            if name not in ("examples", "default"):
                _forbid_nul(one)


def _forbid_null(schema: dict[str, Any]) -> None:
    """Say of a parameter that it is left out, and not null, if it has no value."""
    kinds = [one for one in schema.get("anyOf", []) if one != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.update(kinds[0])


def _join_paths(operation: dict[str, Any]) -> None:
    parameters = operation.get("parameters", [])
    if {"path", "pathBase64"} <= {one["name"] for one in parameters if one["in"] == "query"}:
        operation["parameters"] = [
            _FILE,
            *(one for one in parameters if one["name"] not in ("path", "pathBase64")),
        ]


_JSON_OBJECT = {"application/json": {"schema": {"type": "object"}}}


_ORG_ID = {
    "name": "orgId",
    "in": "query",
    "required": False,
    "schema": {"type": "string", "format": "uuid"},
    "description": "Which of a session's organizations is meant; a key's must be its own.",
}


def _describe_truly(app: FastAPI) -> None:
    """Make the description true: bad input is answered 400, never 422; bodies have a limit."""
    made = app.openapi

    @cache
    def describe() -> dict[str, Any]:
        description = made()
        for name, schema in description["components"]["schemas"].items():
            if not name.endswith("Out"):
                _forbid_nul(schema)
        for path, methods in description["paths"].items():
            for operation in methods.values():
                if path.startswith("/v1"):
                    operation.setdefault("parameters", []).append(_ORG_ID)
                operation["responses"].pop("422", None)
                _join_paths(operation)
                for one in operation.get("parameters", []):
                    _forbid_null(one["schema"])
                    if "contentMediaType" in one["schema"]:
                        one["content"] = _JSON_OBJECT
                        del one["schema"]
                    else:
                        _forbid_nul(one["schema"])
                if "requestBody" in operation:
                    operation["responses"]["413"] = {
                        **operation["responses"]["400"],
                        "description": "The body is too large.",
                    }
        return description

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way
