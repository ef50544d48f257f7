"""/docs: the API to read and to try, with nothing loaded from anywhere else."""

from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from sandyard.server.api.access import open_to_all
from sandyard.server.core.errors import NotFoundError

router = APIRouter(include_in_schema=False)

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
    # The page's own files alone; it writes styles into its elements, and draws its icons so.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/docs")
@open_to_all
async def docs() -> HTMLResponse:
    """Give the page."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


@router.get("/docs/{name}")
@open_to_all
async def docs_file(name: str) -> Response:
    """Give one of the files that the page is made of."""
    if name == "start.js":
        return Response(_START, media_type="text/javascript", headers=_HEADERS)
    if name not in _KINDS:
        raise NotFoundError(f"cannot find /docs/{name}: the page is at /docs")
    content = (files("fastapi_offline") / "static" / name).read_bytes()
    kept = {"Cache-Control": "public, max-age=86400"}
    return Response(content, media_type=_KINDS[name], headers={**_HEADERS, **kept})
