"""/: the page for a person who opens the server's address in a browser."""

from html import escape

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

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


async def welcome(request: Request) -> Response:
    """Return the page: name, version and links."""
    page = _PAGE.format(version=escape(request.app.state.version))
    return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'"})


ROUTES = (Route("/", welcome, methods=["GET"]),)
