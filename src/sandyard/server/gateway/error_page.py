"""Errors of previews: a page for people, JSON for programs."""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="robots" content="noindex"><title>{title} · Sandyard</title>{refresh}
<style>
:root{{color-scheme:light dark;--back:#f6f5f2;--card:#fff;--ink:#23262b;--soft:#666c75;
--line:#e3e1db;--code:#f0eee9;--mark:#c08a3e}}
@media(prefers-color-scheme:dark){{:root{{--back:#16181b;--card:#1e2125;--ink:#e4e6e9;
--soft:#9aa1ab;--line:#30343a;--code:#2a2e34;--mark:#d9a75c}}}}
*{{box-sizing:border-box}}
body{{margin:0;min-height:100vh;display:grid;place-items:center;padding:24px 16px;
font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--back)}}
main{{width:100%;max-width:38rem;background:var(--card);border:1px solid var(--line);
border-radius:12px;padding:28px 32px;overflow-wrap:anywhere}}
header{{display:flex;align-items:center;gap:8px;color:var(--soft);font-size:.85rem;
font-weight:600;letter-spacing:.02em}}
header i{{width:10px;height:10px;border-radius:3px;background:var(--mark)}}
h1{{font-size:1.45rem;line-height:1.3;margin:18px 0 8px}}
p{{margin:0}}
dl{{margin:22px 0 0;padding-top:6px;border-top:1px solid var(--line)}}
dt{{margin-top:14px;color:var(--soft);font-size:.85rem}}
dd{{margin:2px 0 0}}
code{{font:.9em ui-monospace,monospace;background:var(--code);padding:.1em .35em;
border-radius:4px}}
footer{{margin-top:24px;color:var(--soft);font-size:.8rem}}
@media(max-width:30rem){{main{{padding:22px 20px}}h1{{font-size:1.25rem}}}}
</style></head><body><main><header><i></i>Sandyard</header>
<h1>{title}</h1><p>{text}</p>
<dl><dt>If somebody sent you this link</dt><dd>{visitor}</dd>
<dt>If this is your sandbox</dt><dd>{owner}</dd></dl>
<footer>{status} · request {id}</footer></main></body></html>
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Message:
    """The text of an error, in HTML: what happened, what a visitor with a link can do, and what the
    sandbox's owner can do."""

    title: str
    text: str
    visitor: str
    owner: str


def rendered(
    status: int,
    code: str,
    message: Message,
    *,
    request_id: str,
    wants_page: bool,
    refresh_s: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of an error answer."""
    if wants_page:
        refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">'
        body = _PAGE.format(
            title=html.escape(message.title),
            text=message.text,
            visitor=message.visitor,
            owner=message.owner,
            refresh=refresh,
            status=status,
            id=html.escape(request_id),
        ).encode()
        kind = "text/html; charset=utf-8"
    else:
        text = f"{message.title}: {_plain(message.text)} {_plain(message.owner)}"
        error = {"code": code, "message": text, "requestId": request_id}
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


def _plain(text: str) -> str:
    return html.unescape(text.replace("<code>", "`").replace("</code>", "`"))
