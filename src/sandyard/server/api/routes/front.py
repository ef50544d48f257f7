"""/: where somebody who opens the address in a browser finds out what this is."""

from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from sandyard.server.api.access import open_to_all

router = APIRouter(include_in_schema=False)

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Sandyard</title></head>
<body>
<h1>Sandyard {version}</h1>
<p>Real virtual machines for agents and people.</p>
<ul>
<li><a href="/docs">The API, route by route</a></li>
<li><a href="/openapi.json">Its description for programs (OpenAPI)</a></li>
<li><a href="/healthz">Is the server up?</a> <a href="/readyz">Can it make sandboxes?</a></li>
</ul>
</body>
</html>
"""


@router.get("/")
@open_to_all
async def front(request: Request) -> HTMLResponse:
    """Say what this is, in which version, and where to go on."""
    page = _PAGE.format(version=escape(request.app.version))
    return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'"})
