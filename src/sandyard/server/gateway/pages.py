"""What a preview says by itself: a page for people, JSON for programs."""

import html
import json
from collections.abc import Mapping
from http import HTTPStatus

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>{refresh}
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36em;margin:15vh auto;padding:0 1em;
color:#222;background:#fff}}code{{background:#eee;padding:.1em .3em;border-radius:3px}}
h1{{font-size:1.3em}}p.id{{color:#777;font-size:.85em}}
@media(prefers-color-scheme:dark){{body{{color:#ddd;background:#181818}}code{{background:#333}}}}
</style></head><body><h1>{title}</h1><p>{text}</p><p class="id">{id}</p></body></html>
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def said(
    status: int,
    code: str,
    title: str,
    text: str,
    *,
    request_id: str,
    wants_page: bool,
    refresh_s: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of an answer that no guest gave."""
    if wants_page:
        refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">'
        body = _PAGE.format(
            title=html.escape(title), text=text, refresh=refresh, id=html.escape(request_id)
        ).encode()
        kind = "text/html; charset=utf-8"
    else:
        message = html.unescape(text.replace("<code>", "`").replace("</code>", "`"))
        error = {"code": code, "message": f"{title}: {message}", "requestId": request_id}
        body, kind = json.dumps({"error": error}).encode(), "application/json"
    found = {
        "content-type": kind,
        "content-length": str(len(body)),
        "cache-control": "no-store",
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "x-request-id": request_id,
        **(headers or {}),
    }
    return [(name.encode(), value.encode("latin-1")) for name, value in found.items()], body


def status_line(status: int) -> bytes:
    """Return the first line of an answer."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()
