"""The pages of a terminal and a desktop, and the files that pages load."""

import base64
import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from sandyard.server.core.errors import NotFoundError

_KINDS = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css",
          ".txt": "text/plain; charset=utf-8"}  # fmt: skip
_POLICY = "Content-Security-Policy"
_HEADERS = {
    # The page's own files only. Its libraries set styles on elements and draw images from data
    # URLs.
    _POLICY: "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _root() -> Traversable:
    return files("sandyard.server.pages") / "web"


@cache
def _files() -> dict[str, Traversable]:
    """Return all files that may be requested, by path."""
    found, folders = dict[str, Traversable](), [("", _root())]
    while folders:
        prefix, folder = folders.pop()
        for one in folder.iterdir():
            path = f"{prefix}{one.name}"
            if one.is_dir():
                folders.append((f"{path}/", one))
            else:
                found[path] = one
    return found


@cache
def _loader() -> tuple[bytes, str]:
    """Return the inline script that loads the rest of a page, and the policy that allows it."""
    found = _files()["load.js"].read_bytes()
    digest = base64.b64encode(hashlib.sha256(found).digest()).decode()
    return found, _HEADERS[_POLICY].replace(
        "script-src 'self'", f"script-src 'self' 'sha256-{digest}'"
    )


def page(name: str) -> HTMLResponse:
    """Return a page."""
    loader, policy = _loader()
    content = _files()[name].read_bytes().replace(b"@load@", loader)
    kept = {_POLICY: policy, "Cache-Control": "no-cache"}
    return HTMLResponse(content, headers={**_HEADERS, **kept})


async def terminal_page(_: Request) -> Response:
    """Return the page of a terminal. The page reads the sandbox from its URL and asks for a key."""
    return page("terminal.html")


async def desktop_page(_: Request) -> Response:
    """Return the page of a desktop. Its URL may carry a ticket; otherwise it asks for a key."""
    return page("desktop.html")


async def web_file(request: Request) -> Response:
    """Return one of the files that pages load."""
    path: str = request.path_params["path"]
    found, dot, ending = _files().get(path), *path.rpartition(".")[1:]
    kind = _KINDS.get(dot + ending)
    if found is None or kind is None:
        raise NotFoundError(f"cannot find /web/{path[:200]}: no page has such a file")
    kept = {"Cache-Control": "public, max-age=3600"}
    return Response(found.read_bytes(), media_type=kind, headers={**_HEADERS, **kept})


ROUTES = (
    Route("/terminal/{reference}", terminal_page, methods=["GET"]),
    Route("/desktop/{reference}", desktop_page, methods=["GET"]),
    Route("/web/{path:path}", web_file, methods=["GET"]),
)
