"""The application for the daemon of all sandboxes."""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sandyard.server.core.errors import SandyardError
from sandyard.server.e2b.credentials import access_token, file_signature
from sandyard.server.e2b.envd import filesystem, process
from sandyard.server.e2b.envd.files import environment, figures, health, read_file, write_files
from sandyard.server.e2b.errors import render_envd
from sandyard.server.e2b.names import Target, target_of
from sandyard.server.front.edge import Edge
from sandyard.server.front.face import EdgeServices, Face
from sandyard.server.service.services import Services

_OPEN = frozenset({"/health"})


def make_envd(services: Services, edge: EdgeServices, domain: str | None) -> ASGIApp:
    """Return the application."""
    face = Face(
        name="e2b-envd",
        guards=lambda path: path not in _OPEN,
        credentials=(access_token(_target), file_signature(_target)),
        render=_render,
        json_only=False,
        resets=True,
    )
    calls = {
        **{f"/process.Process/{name}": one for name, one in process.METHODS.items()},
        **{f"/filesystem.Filesystem/{name}": one for name, one in filesystem.METHODS.items()},
    }
    app = Starlette(
        routes=[
            *(Route(path, one, methods=["POST"]) for path, one in calls.items()),
            Route("/files", read_file, methods=["GET"]),
            Route("/files", write_files, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            Route("/envs", environment, methods=["GET"]),
            Route("/metrics", figures, methods=["GET"]),
            Route("/{path:path}", _absent, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ],
        middleware=[
            # Outermost, so that a browser may ask without a token. A page needs one for the rest.
            Middleware(
                CORSMiddleware,
                allow_origins=["*"],
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["*"],
                max_age=600,
            ),
            Middleware(Edge, face=face, services=edge),
        ],
        exception_handlers={SandyardError: _answer},
    )
    app.state.services = services
    return _Targeted(app, domain)


class _Targeted:
    """Notes which sandbox a request is for."""

    def __init__(self, app: ASGIApp, domain: str | None) -> None:
        self._app = app
        self._domain = domain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope.setdefault("state", {})["target"] = target_of(scope, self._domain)
        await self._app(scope, receive, send)


def _target(connection: HTTPConnection) -> Target:
    target: Target = connection.state.target
    return target


def _render(connection: HTTPConnection, error: SandyardError) -> Response:
    return render_envd(_target(connection).sandbox_id, error)


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, SandyardError)
    return _render(request, error)


async def _absent(request: Request) -> Response:
    message = f"there is no {request.method} {request.url.path[:200]} here"
    return JSONResponse({"code": 404, "message": message}, status_code=404)
