"""The pages as a face of the listener: public, without credentials."""

from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from sandyard.server.core.errors import NotFoundError, SandyardError
from sandyard.server.front.edge import Edge
from sandyard.server.front.face import EdgeServices, Face
from sandyard.server.pages import docs, screens, welcome

PATHS = ("/", "/docs")
PREFIXES = ("/docs", "/terminal", "/desktop", "/web")
"""Where pages are, on the hosts of the API."""


def make_pages(edge: EdgeServices, *, version: str) -> Starlette:
    """Return the application."""
    face = Face(
        name="pages",
        guards=lambda _: False,
        credentials=(),
        render=_render,
        json_only=False,
    )
    app = Starlette(
        routes=[*welcome.ROUTES, *docs.ROUTES, *screens.ROUTES],
        middleware=[Middleware(Edge, face=face, services=edge)],
        exception_handlers={HTTPException: _routed},
    )
    app.router.redirect_slashes = False
    app.state.version = version
    return app


def _render(connection: HTTPConnection, error: SandyardError) -> Response:
    if isinstance(error, NotFoundError):
        return _refusal(connection, HTTPStatus.NOT_FOUND, error.message)
    return _refusal(connection, HTTPStatus.INTERNAL_SERVER_ERROR, "cannot show the page")


async def _routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _refusal(request, HTTPStatus.NOT_FOUND, f"cannot find {path}: see /docs")
    message = f"cannot {request.method} {path}: {error.detail}"
    answer = _refusal(request, HTTPStatus(error.status_code), message)
    answer.headers.update(error.headers or {})
    return answer


def _refusal(connection: HTTPConnection, status: HTTPStatus, message: str) -> Response:
    error = {
        "code": "not_found" if status is HTTPStatus.NOT_FOUND else "bad_request",
        "message": message,
        "requestId": connection.state.request_id,
    }
    return JSONResponse({"error": error}, status_code=status)
