"""The application: its routes behind its edge, described as they are."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from sandyard.server.api.edge import Edge, RequestObserver
from sandyard.server.api.errors import answer_error, install_handlers
from sandyard.server.api.routes import (
    activity,
    api_keys,
    billing,
    commands,
    desktops,
    docs,
    files,
    front,
    health,
    organizations,
    pages,
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
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.feed import Feed
from sandyard.server.service.money.billing import Billing
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.logins import Logins
from sandyard.server.service.people.organizations import Organizations
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.people.ssh_keys import SshKeys
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.create import Creation
from sandyard.server.service.sandboxes.desktops import Desktops
from sandyard.server.service.sandboxes.execute import Commands
from sandyard.server.service.sandboxes.files import Files
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.previews import Previews
from sandyard.server.service.sandboxes.processes import Processes
from sandyard.server.service.sandboxes.signing import Signing
from sandyard.server.service.sandboxes.snapshots import Snapshots
from sandyard.server.service.sandboxes.terminals import Terminals
from sandyard.server.service.templates import Templates
from sandyard.server.service.workspaces.files import WorkspaceFiles
from sandyard.server.service.workspaces.workspaces import Workspaces

log = logging.getLogger(__name__)

ROUTES = (
    sandboxes, commands, processes, files, ways, desktops, snapshots, organizations, projects,
    api_keys, ssh_keys, activity, billing, templates, workspaces, health, front, docs, pages,
    planned,
)  # fmt: skip
"""What is served, a module a subject."""


_EXPOSED = [
    "X-Request-Id", "Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
]  # fmt: skip


@dataclass(frozen=True)
class Services:
    """What the routes call."""

    access: Access
    rates: Rates
    organizations: Organizations
    api_keys: ApiKeys
    ssh_keys: SshKeys
    feed: Feed
    billing: Billing
    now: Callable[[], datetime]
    creation: Creation
    sandboxes: Sandboxes
    commands: Commands
    processes: Processes
    files: Files
    signing: Signing
    addresses: Addresses
    logins: Logins
    previews: Previews
    forwards: Forwards
    terminals: Terminals
    desktops: Desktops
    snapshots: Snapshots
    templates: Templates
    workspaces: Workspaces
    workspace_files: WorkspaceFiles
    readiness: Readiness


def make_api(
    services: Services,
    *,
    version: str,
    observe: RequestObserver,
    bind: Callable[[str], object],
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Return the application. `bind` is told each request's id before it is served.

    Pages of `cors_origins` may use it in a browser.
    """
    app = FastAPI(
        title="Sandyard",
        version=version,
        description="Real virtual machines for agents and people.",
        redirect_slashes=False,
        docs_url=None,  # of our own, see routes/docs.py
        redoc_url=None,
        strict_content_type=False,  # a body that says nothing of its type is JSON
    )
    app.state.services = services
    app.state.log = log
    install_handlers(app)
    for routes in ROUTES:
        app.include_router(routes.router)
    _describe_truly(app)
    app.add_middleware(
        Edge,
        access=services.access,
        signing=services.signing,
        redeem={"terminal": services.terminals.redeem, "desktop": services.desktops.redeem},
        rates=services.rates,
        observe=observe,
        bind=bind,
    )
    if cors_origins:
        # Outermost: a browser asks first (OPTIONS), without the credential.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
            max_age=600,
        )
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


__all__ = ["RequestObserver", "Services", "answer_error", "make_api"]
