"""Pages for people: a terminal in a browser, and the files that pages are made of."""

import base64
import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from sandyard.server.api.access import open_to_all
from sandyard.server.core.errors import NotFoundError

router = APIRouter(include_in_schema=False)

_KINDS = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css",
          ".txt": "text/plain; charset=utf-8"}  # fmt: skip
_POLICY = "Content-Security-Policy"
_HEADERS = {
    # A page's own files alone. What they are made of writes styles into elements, and draws
    # pictures that it has made itself.
    _POLICY: "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _root() -> Traversable:
    return files("sandyard.server.api") / "web"


@cache
def _files() -> dict[str, Traversable]:
    """Return what may be asked for, by its path: nothing else is ever looked for."""
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
    """Return what loads the rest of a page and lies within it, and the policy that lets it run."""
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


@router.get("/terminal/{reference}")
@open_to_all
async def terminal_page(reference: str) -> HTMLResponse:
    """Give the page of a terminal; it asks for a key itself."""
    del reference  # the page reads it from its own address
    return page("terminal.html")


@router.get("/desktop/{reference}")
@open_to_all
async def desktop_page(reference: str) -> HTMLResponse:
    """Give the page of a desktop; its address may bring a ticket, else it asks for a key."""
    del reference
    return page("desktop.html")


@router.get("/web/{path:path}")
@open_to_all
async def web_file(path: str) -> Response:
    """Give one of the files that pages are made of."""
    found, dot, ending = _files().get(path), *path.rpartition(".")[1:]
    kind = _KINDS.get(dot + ending)
    if found is None or kind is None:
        raise NotFoundError(f"cannot find /web/{path[:200]}: no page has such a part")
    kept = {"Cache-Control": "public, max-age=3600"}
    return Response(found.read_bytes(), media_type=kind, headers={**_HEADERS, **kept})
