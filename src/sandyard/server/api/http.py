"""The application: its routes behind its edge, described as they are."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from sandyard.server.api.credentials import readers
from sandyard.server.api.errors import answer_error, install_handlers
from sandyard.server.api.routes import (
    activity,
    api_keys,
    billing,
    commands,
    desktops,
    files,
    health,
    organizations,
    planned,
    processes,
    projects,
    sandboxes,
    snapshots,
    ssh_keys,
    templates,
    ways,
    workspaces,
)
from sandyard.server.front.edge import Edge
from sandyard.server.front.face import EdgeServices, Face
from sandyard.server.service.services import Services

log = logging.getLogger(__name__)

ROUTES = (
    sandboxes, commands, processes, files, ways, desktops, snapshots, organizations, projects,
    api_keys, ssh_keys, activity, billing, templates, workspaces, health, planned,
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
        strict_content_type=False,  # a body without a Content-Type is taken for JSON
    )
    for routes in ROUTES:
        app.include_router(routes.router)
    _describe_truly(app)
    return app


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

    def describe() -> dict[str, Any]:
        description = made()
        for path, methods in description["paths"].items():
            for operation in methods.values():
                if path.startswith("/v1"):
                    operation.setdefault("parameters", []).append(_ORG_ID)
                operation["responses"].pop("422", None)
                if "requestBody" in operation:
                    operation["responses"]["413"] = {
                        **operation["responses"]["400"],
                        "description": "The body is too large.",
                    }
        return description

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way
