"""/docs: the API reference in a browser, with nothing loaded from other hosts."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from sandyard.server.core.errors import NotFoundError

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Sandyard API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""
_KINDS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_HEADERS = {
    # The page's own files only. It sets styles on elements and draws icons from data URLs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def docs(_: Request) -> Response:
    """Return the page."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


async def docs_file(request: Request) -> Response:
    """Return one of the files that the page loads."""
    name: str = request.path_params["name"]
    if name == "start.js":
        return Response(_START, media_type="text/javascript", headers=_HEADERS)
    if name not in _KINDS:
        raise NotFoundError(f"cannot find /docs/{name[:200]}: the page is at /docs")
    content = (files("fastapi_offline") / "static" / name).read_bytes()
    kept = {"Cache-Control": "public, max-age=86400"}
    return Response(content, media_type=_KINDS[name], headers={**_HEADERS, **kept})


ROUTES = (
    Route("/docs", docs, methods=["GET"]),
    Route("/docs/{name}", docs_file, methods=["GET"]),
)
