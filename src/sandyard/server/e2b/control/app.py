"""The application of the control API."""

from collections.abc import Mapping
from typing import Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from sandyard.server.core.errors import SandyardError
from sandyard.server.e2b.control import routes, templates
from sandyard.server.e2b.credentials import api_key, upload_signature
from sandyard.server.e2b.errors import render_control
from sandyard.server.front.edge import Edge
from sandyard.server.front.face import EdgeServices, Face
from sandyard.server.service.services import Services

PREFIXES: Final = (
    "/sandboxes", "/v2/sandboxes", "/snapshots", "/templates", "/v2/templates", "/v3/templates",
    "/volumes", "/secrets",
)  # fmt: skip
"""How the paths begin that are served at the host names of all APIs, too."""


def make_control(
    services: Services,
    edge: EdgeServices,
    domain: str | None,
    *,
    has_public_ports: bool,
    images: Mapping[str, str],
) -> ASGIApp:
    """Return the application."""
    face = Face(
        name="e2b",
        guards=lambda _: True,
        credentials=(upload_signature, api_key),
        render=render_control,
        json_only=True,
    )
    app = Starlette(
        routes=[
            *routes.ROUTES,
            *templates.ROUTES,
            Route("/{path:path}", routes.absent, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ],
        middleware=[Middleware(Edge, face=face, services=edge)],
        exception_handlers={SandyardError: _answer},
    )
    app.state.services = services
    app.state.domain = domain
    app.state.has_public_ports = has_public_ports
    app.state.images = images
    return app


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, SandyardError)
    return render_control(request, error)
