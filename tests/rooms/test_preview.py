"""Previews, on fake machines whose ports lead to servers of the test's own."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.support.door import BRIEF, SOON_S, Door, door
from tests.support.house import eventually, until
from tests.support.listener import PORT, Listener, listening
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as websocket_server
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from sandyard.server.core.contracts.store import Turn
from sandyard.server.fakes.driver import Conduct
from sandyard.server.front import ports, proxy
from sandyard.server.links.local import SystemClock

SOCKETS = 4000
CLOSED = 5000


@dataclass
class Shown:
    """A sandbox whose ports are shown."""

    opened: Door
    listener: Listener
    box: dict[str, Any]

    async def url(self, port: int = PORT, **query: str) -> str:
        """Return what the API gives out."""
        answer = await self.opened.yard.client.get(
            f"/v1/sandboxes/{self.box['id']}/url", params={"port": str(port), **query}
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"]["url"])

    async def host(self, port: int = PORT) -> str:
        """Return a host name with a token in it."""
        return urlsplit(await self.url(port)).netloc

    def plain(self, port: int = PORT) -> str:
        """Return the host name without one."""
        return f"{port}-{self.box['id']}.preview.localhost:{self.opened.port}"

    def client(self, host: str, **headers: str) -> httpx.AsyncClient:
        """Return a client that knows where a name leads, and says which it means."""
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.opened.port}",
            headers={"Host": host, **headers},
            timeout=SOON_S,
        )

    async def get(self, host: str, path: str = "/", **headers: str) -> httpx.Response:
        """Ask once."""
        async with self.client(host, **headers) as client:
            return await client.get(f"http://127.0.0.1:{self.opened.port}{path}")

    @asynccontextmanager
    async def socket(self, host: str, path: str = "/", **options: Any) -> AsyncIterator[Any]:
        """Connect with a WebSocket."""
        async with connect(
            f"ws://{host}{path}", host="127.0.0.1", port=self.opened.port, proxy=None, **options
        ) as found:
            yield found


@pytest.fixture
async def shown(tmp_path: Path) -> AsyncIterator[Shown]:
    async with listening() as (listener, port):
        conduct = Conduct(ports={PORT: port})
        async with door(tmp_path, saves=True, conduct=conduct) as opened:
            yield Shown(opened, listener, await opened.yard.create(name="shown"))
    assert listener.open == 0


# --- who may ----------------------------------------------------------------------------------


async def test_a_token_in_the_name_lets_anybody_in_whatever_they_make_of_path_and_query(
    shown: Shown,
) -> None:
    url = await shown.url()
    host = urlsplit(url).netloc
    assert url == f"http://{host}/"
    said = (await shown.get(host, "/a%2Fb//c?x=%41&y", Authorization="token theirs")).json()["head"]
    assert said.startswith("GET /a%2Fb//c?x=%41&y HTTP/1.1\r\n")
    assert f"host: localhost:{PORT}\r\n" in said
    assert "authorization: token theirs\r\n" in said
    assert "connection: close\r\n" in said
    assert host not in said
    async with shown.client(host) as client:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"):
            answer = await client.request(method, "/")
            assert answer.json()["head"].startswith(f"{method} / ")
            assert answer.headers["referrer-policy"] == "same-origin"
            assert answer.headers["x-request-id"].startswith("req_")
    # Asked again, it is the same, for a while: who asks often makes no more of them.
    assert await shown.url() == url


async def test_a_browser_gets_a_cookie_for_a_token_and_goes_on_without_it(shown: Shown) -> None:
    url = urlsplit(await shown.url(access="cookie"))
    host, token = url.netloc, url.query.removeprefix("rt_token=")
    assert host == shown.plain()
    for how in ({"Sec-Fetch-Mode": "navigate"}, {"Accept": "text/html,*/*"}):
        moved = await shown.get(host, f"//evil.example/a?b=1&rt_token={token}&c", **how)
        assert moved.status_code == 302
        assert moved.headers["location"] == f"http://{host}//evil.example/a?b=1&c"
        cookie = moved.headers["set-cookie"]
        assert cookie.startswith(
            f"sandyard_preview={token}; Path=/; HttpOnly; SameSite=Lax; Max-Age="
        )
        assert "domain" not in cookie.lower()
    kept = f"x=1; sandyard_preview={token}"
    said = (await shown.get(host, "/a", Cookie=kept)).json()["head"]
    assert "cookie: x=1\r\n" in said
    assert token not in said
    # What is no page is served as it is: programs keep no cookies and follow nothing.
    said = (await shown.get(host, f"/a?rt_token={token}&b")).json()["head"]
    assert said.startswith("GET /a?b HTTP/1.1\r\n")
    for mode in ("cors", "websocket", "no-cors"):
        how = {"Sec-Fetch-Mode": mode, "Accept": "text/html"}
        assert (await shown.get(host, f"/?rt_token={token}", **how)).status_code == 200
    # A page of another preview is the same site to a browser, which sends the cookie along.
    for origin in ("http://80-sandbox-aaaaaaaaaaaa.preview.localhost", "null", "https://a.example"):
        assert (await shown.get(host, "/a", Cookie=kept, Origin=origin)).status_code == 401
    assert (await shown.get(host, "/a", Cookie=kept, Origin=f"http://{host}")).status_code == 200
    for site in ("same-site", "cross-site"):
        how = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Cookie": kept}
        assert (await shown.get(host, "/a", **how)).status_code == 401
        how["Sec-Fetch-Mode"] = "navigate"  # a link that is followed
        assert (await shown.get(host, "/a", **how)).status_code == 200
    # What other pages plant beside it does not hide it.
    planted = "sandyard_preview=x; " * 6 + kept
    assert (await shown.get(host, "/a", Cookie=planted)).status_code == 200


async def test_a_credential_of_the_api_lets_in_and_goes_no_further(shown: Shown) -> None:
    yard, host = shown.opened.yard, shown.plain()
    for how in ({"Authorization": f"Bearer {yard.key}"}, {"X-API-Key": yard.key}):
        answer = await shown.get(host, "/", **how)
        assert answer.status_code == 200
        assert yard.key not in answer.text
        assert "authorization" not in answer.json()["head"]
    # In a name with a token a key of ours is not sent on either.
    answer = await shown.get(await shown.host(), "/", Authorization=f"Bearer {yard.key}")
    assert yard.key not in answer.text
    org_id, user_id = await yard.first()
    reader = await yard.add_key(org_id, user_id, scopes=("sandbox:read",))
    member = await yard.add_key(org_id, await yard.add_member(org_id))
    for key, status in (
        (await yard.stranger(), 404), (member, 404), (reader, 403), ("rt_live_" + "x" * 32, 401),
        ("rt_test_x", 401), ("x", 401),
    ):  # fmt: skip
        answer = await shown.get(host, "/", Authorization=f"Bearer {key}")
        assert answer.status_code == status, key
        assert str(shown.box["id"]) not in answer.text
    assert shown.listener.heard[-1].count("rt_") == 0


async def test_nobody_else_is_let_in_and_is_told_how(shown: Shown) -> None:
    host, named = shown.plain(), await shown.host()
    token = named.split(".")[0].rpartition("-")[2]
    other = await shown.opened.yard.create(name="other")
    unknown = f"{PORT}-{other['id']}"
    wrong = "a" * 26
    for name in (
        host, f"{PORT}-sandbox-aaaaaaaaaaaa.{host.partition('.')[2]}",
        f"3001-{shown.box['id']}-{token}.{host.partition('.')[2]}",
        f"{unknown}-{token}.{host.partition('.')[2]}",
        f"{PORT}-{shown.box['id']}-{wrong}.{host.partition('.')[2]}",
    ):  # fmt: skip
        answer = await shown.get(name, "/v1/sandboxes")
        assert answer.status_code == 401, name
        assert answer.json()["error"]["code"] in ("unauthorized", "invalid_token")
    for query in (f"rt_token={wrong}", "rt_token=", f"rt_token={wrong}&rt_token={token}"):
        assert (await shown.get(host, f"/?{query}")).status_code == 401
    assert (await shown.get(host, "/", Cookie=f"sandyard_preview={wrong}")).status_code == 401
    page = await shown.get(host, "/", Accept="text/html")
    assert page.status_code == 401
    assert "sandyard sandbox url" in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert shown.listener.heard == []


async def test_any_good_credential_lets_in_beside_one_that_is_not(shown: Shown) -> None:
    key, bad = f"Bearer {shown.opened.yard.key}", "a" * 26
    plain = shown.plain()
    in_name = plain.replace(".", f"-{bad}.", 1)
    for host, path in ((plain, f"/?rt_token={bad}"), (in_name, "/")):
        assert (await shown.get(host, path)).status_code == 401
        assert (await shown.get(host, path, Authorization=key)).status_code == 200
        browser = {"Sec-Fetch-Mode": "navigate", "Accept": "text/html"}
        found = await shown.get(host, path, **{"Authorization": key, **browser})
        assert found.status_code == 200


async def test_a_browser_may_come_by_another_port_or_by_a_name_that_ends_in_a_dot(
    shown: Shown,
) -> None:
    host = await shown.host()
    name = host.partition(":")[0]
    for known in (
        host,
        name,
        f"{name}:9",
        f"{name}.:{shown.opened.port}",
        f"{name}.",
        f"{name}:80",
    ):
        assert (await shown.get(known)).status_code == 200, known
    # By a cookie as well: it is sent on to where it came from.
    token = urlsplit(await shown.url()).netloc.partition(".")[0].rpartition("-")[2]
    plain = f"{shown.plain().partition(':')[0]}:9"
    browser = {"Sec-Fetch-Mode": "navigate", "Accept": "text/html"}
    sent_on = await shown.get(plain, f"/a?rt_token={token}", **browser)
    assert (sent_on.status_code, sent_on.headers["location"]) == (302, f"http://{plain}/a")
    cookie = sent_on.headers["set-cookie"].partition(";")[0]
    own = {"Cookie": cookie, "Origin": f"http://{plain}"}
    assert (await shown.get(plain, **own)).status_code == 200
    others = {"Cookie": cookie, "Origin": f"http://{shown.plain()}"}
    assert (await shown.get(plain, **others)).status_code == 401


async def test_a_url_ends_with_whoever_made_it(shown: Shown) -> None:
    yard = shown.opened.yard
    org_id, user_id = await yard.first()
    key = await yard.add_key(org_id, user_id)
    async with yard.client_of(key) as client:
        made = await client.get(f"/v1/sandboxes/{shown.box['id']}/url", params={"port": "3000"})
    host = urlsplit(made.json()["data"]["url"]).netloc
    assert (await shown.get(host)).status_code == 200
    async with yard.house.store.write(Turn.ALONE) as tx:
        (held,) = [
            one for one in await tx.keys.page(org_id, owner_user_id=None, limit=10)
            if key.startswith(one.prefix)
        ]  # fmt: skip
        await tx.keys.replace(replace(held, revoked_at=datetime.now(UTC)))
    assert (await shown.get(host)).status_code == 401
    events = (await yard.client.get(f"/v1/sandboxes/{shown.box['id']}/activity")).json()
    issued = [one for one in events["data"]["events"] if one["eventType"] == "sandbox.url.issued"]
    assert issued[0]["attributes"]["port"] == 3000


@pytest.mark.parametrize("how", ["revoke", "rotate"])
async def test_what_is_open_ends_with_whoever_made_its_url(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ports, "_CHECK_S", 0.05)
    yard = shown.opened.yard
    made = (await yard.client.post("/v1/api-keys", json={"name": "k"})).json()["data"]
    async with yard.client_of(made["key"]) as client:
        found = await client.get(f"/v1/sandboxes/{shown.box['id']}/url", params={"port": "3000"})
    host = urlsplit(found.json()["data"]["url"]).netloc
    async with shown.client(host) as client, client.stream("GET", "/events") as events:
        feed = events.aiter_raw()
        await anext(feed)
        if how == "revoke":
            await yard.client.delete(f"/v1/api-keys/{made['id']}")
        else:
            (await yard.client.post(f"/v1/api-keys/{made['id']}/rotate")).raise_for_status()
        with pytest.raises(httpx.RemoteProtocolError):
            async with asyncio.timeout(SOON_S):
                await anext(feed)
    assert (await shown.get(host)).status_code == 401


class Later(SystemClock):
    """A clock that can be put forward."""

    by_s = 0.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(super().now().timestamp() + self.by_s, UTC)


@pytest.mark.parametrize(
    ("query", "lasts_s"), [("", 3600), ("&ttl=60", 60), ("&ttl=2592000", 2592000)]
)
async def test_a_url_expires(tmp_path: Path, query: str, lasts_s: int) -> None:
    clock = Later()
    async with (
        listening() as (listener, port),
        door(tmp_path, saves=True, conduct=Conduct(ports={PORT: port}), clock=clock) as opened,
    ):
        found = Shown(opened, listener, await opened.yard.create(idleTimeout=0))
        before = clock.now()
        answer = await opened.yard.client.get(
            f"/v1/sandboxes/{found.box['id']}/url?port=3000{query}"
        )
        data = answer.json()["data"]
        until = datetime.fromisoformat(data["expiresAt"])
        assert (until - before).total_seconds() >= lasts_s - 1
        until_s = (until - clock.now()).total_seconds()
        assert until_s <= lasts_s * 25 / 24
        host = urlsplit(data["url"]).netloc
        assert (await found.get(host)).status_code == 200
        clock.by_s = until_s + 1
        answer = await found.get(host)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_expired")


@pytest.mark.parametrize("ttl", ["59", "2592001", "-1", "a", ""])
async def test_a_url_holds_for_a_minute_to_a_month(shown: Shown, ttl: str) -> None:
    path = f"/v1/sandboxes/{shown.box['id']}/url"
    answer = await shown.opened.yard.client.get(path, params={"port": "3000", "ttl": ttl})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
    assert "ttl" in answer.json()["error"]["message"]


@pytest.mark.parametrize("port", ["0", "65536", "9111", "-1", "a", "+80", ""])
async def test_what_is_no_port_of_the_sandboxs_own_gets_no_url(shown: Shown, port: str) -> None:
    answer = await shown.opened.yard.client.get(
        f"/v1/sandboxes/{shown.box['id']}/url", params={"port": port}
    )
    # A number with a sign is one to HTTP's own rules of numbers.
    assert answer.status_code == (200 if port == "+80" else 400)
    if port != "+80":
        assert answer.json()["error"]["details"]["field"] == "port"


# --- names ------------------------------------------------------------------------------------


async def test_no_name_below_the_domain_ever_leads_to_the_api(shown: Shown) -> None:
    below = f"preview.localhost:{shown.opened.port}"
    box, key = shown.box["id"], shown.opened.yard.key
    for host in (
        below, f"x.{below}", f"9111-{box}.{below}", f"03000-{box}.{below}", f"a@3000-{box}.{below}",
        f"3000-{box}.preview.localhost:0",
            f"3000-{box}.preview.localhost..", f"3000-{box}.{below}.", f"localhost@{below}",
        ):  # fmt: skip
        for path in ("/healthz", "/v1/me", "/openapi.json"):
            answer = await shown.get(host, path, Authorization=f"Bearer {key}")
            assert answer.status_code == 404, (host, path)
            assert answer.json()["error"]["code"] == "not_found"
    async with shown.client(f"3000-{box}.{below}".upper(), Authorization=f"Bearer {key}") as client:
        assert (await client.get("/healthz")).json()["head"].startswith("GET /healthz")
    # The API's own name is not taken for a preview's, whichever path it is asked for.
    answer = await shown.get(f"127.0.0.1:{shown.opened.port}", "/healthz")
    assert answer.json().get("head") is None


async def test_requests_of_one_connection_are_told_apart_each_by_itself(shown: Shown) -> None:
    host = (await shown.host()).encode()
    reader, writer = await shown.opened.knock()
    for name, wanted in ((host, b"GET /healthz"), (b"localhost", b'"ok"'), (host, b"GET /healthz")):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: " + name + b"\r\n\r\n")
        async with asyncio.timeout(SOON_S):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
        assert wanted in body
    writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: {host}\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: +4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: {host}\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: {host}\r\nX\x00: y\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET http://{host} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\n\r\n",
    ],
)
async def test_nothing_is_smuggled_past(shown: Shown, request_: bytes) -> None:
    host = (await shown.host()).encode()
    reader, writer = await shown.opened.knock()
    writer.write(request_.replace(b"{host}", host))
    writer.write_eof()
    async with asyncio.timeout(SOON_S):
        said = await reader.read()
    writer.close()
    assert said.startswith(b"HTTP/1.1 400 "), said
    assert not any("smuggled" in one for one in shown.listener.heard)


# --- what goes through ------------------------------------------------------------------------


async def test_bodies_of_any_size_go_through_as_they_come(shown: Shown) -> None:
    host = await shown.host()
    size = 40 * 1024 * 1024

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // 65536):
            yield b"\1" * 65536

    async with shown.client(host) as client:
        answer = await client.post("/up", content=pieces())
        assert (answer.json()["body"], answer.json()["sum"]) == (size, 1000)
        assert "transfer-encoding: chunked" in answer.json()["head"]
        answer = await client.post("/up", content=pieces(), headers={"Content-Length": str(size)})
        assert answer.json()["body"] == size
        assert f"content-length: {size}" in answer.json()["head"]
        got = 0
        async with client.stream("GET", f"/big/{size}") as down:
            assert down.headers["content-length"] == str(size)
            async for piece in down.aiter_raw():
                got += len(piece)
        assert got == size
        for path, body in (("/chunks", "onetwo"), ("/close", "until the end"), ("/hints", "ok")):
            assert (await client.get(path)).text == body
        assert (await client.post("/early", content=b"x" * 100)).status_code == 413


async def test_an_answer_is_due_once_the_request_is_whole_however_slowly_that_comes(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_s = 0.4
    monkeypatch.setattr("sandyard.server.front.proxy._ANSWER_S", limit_s)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield b"x" * 100
            await asyncio.sleep(limit_s / 4)  # as long as such a client takes

    async with shown.client(await shown.host()) as client:
        assert (await client.post("/up", content=pieces())).json()["body"] == 800
        assert (await client.get("/silent")).status_code == 504


async def test_answers_without_a_body_have_none(shown: Shown) -> None:
    async with shown.client(await shown.host()) as client:
        head = await client.head("/a")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 10
        for status in (204, 304):
            answer = await client.get(f"/status/{status}", headers={"If-None-Match": "x"})
            assert (answer.status_code, answer.content) == (status, b"")
            assert answer.headers["etag"] == "x"
        for status in (600, 999):
            assert (await client.get(f"/status/{status}")).status_code == 502
        assert (await client.get("/both")).text == "hello"
        for status in (206, 404, 500, 599):
            answer = await client.get(f"/status/{status}", headers={"Range": "bytes=0-4"})
            assert (answer.status_code, answer.text) == (status, "hello")
        assert "range: bytes=0-4" in shown.listener.heard[-1]


async def test_who_waits_to_be_asked_for_its_body_is_asked(shown: Shown) -> None:
    reader, writer = await shown.opened.knock()
    host = (await shown.host()).encode()
    writer.write(b"POST /up HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 4\r\n"
                 b"Expect: 100-continue\r\n\r\n")  # fmt: skip
    async with asyncio.timeout(SOON_S):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(b"abcd")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.close()


@pytest.mark.parametrize("how", ["on", "away", "silent"])
async def test_whether_a_body_is_to_be_sent_is_the_guests_to_say(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(proxy, "_CONTINUE_S", 0.3 if how == "silent" else SOON_S)
    reader, writer = await shown.opened.knock()
    host = (await shown.host()).encode()
    writer.write(b"POST /go/" + how.encode() + b" HTTP/1.1\r\nHost: " + host +
                 b"\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")  # fmt: skip
    async with asyncio.timeout(SOON_S):
        head = await reader.readuntil(b"\r\n\r\n")
        if how == "away":
            assert head.startswith(b"HTTP/1.1 417 ")
            assert b"connection: close" in head.lower()
            assert await reader.read() == b"no"
        else:
            assert head.startswith(b"HTTP/1.1 100 ")
            writer.write(b"abcd")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert await reader.readexactly(4) == b"abcd"
    assert "expect: 100-continue" in shown.listener.heard[-1].lower()
    writer.close()


async def test_who_leaves_after_an_early_answer_leaves_nothing_behind(tmp_path: Path) -> None:
    async with listening() as (listener, port):
        conduct = Conduct(ports={PORT: port})
        async with door(tmp_path, saves=True, conduct=conduct, patience=BRIEF) as opened:
            shown = Shown(opened, listener, await opened.yard.create(idleTimeout=0))
            host = (await shown.host()).encode()
            for leaves in (False, True):
                listener.left.clear()
                reader, writer = await opened.knock()
                writer.write(b"POST /ticking HTTP/1.1\r\nHost: " + host +
                             b"\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")  # fmt: skip
                async with asyncio.timeout(SOON_S):
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                    # Longer than a body may stand still that is waited for: this one is not.
                    for _ in range(1 if leaves else 12):
                        assert b"data: 1" in await reader.readuntil(b"\n\n")
                writer.close()
                async with asyncio.timeout(SOON_S):
                    await listener.left.wait()


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /c HT",
        b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n",
    ],
)
async def test_a_connection_whose_last_answer_was_given_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request_: bytes
) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        for _ in range(3):
            reader, writer = await opened.knock()
            writer.write(request_)
            async with asyncio.timeout(SOON_S):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 40")
                with suppress(ConnectionError):
                    writer.write(b"zz\r\n")
                    while await reader.read(65536):
                        pass
                    while True:  # until it takes no more
                        writer.write(b"z")
                        await writer.drain()
                        await asyncio.sleep(0.05)
            writer.close()
        # The rest are told what is wrong with what they send, as before.
        assert (await opened.ask(b"nonsense\r\n\r\n"))[0] == 400
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []


async def test_what_comes_behind_the_last_request_is_not_answered(shown: Shown) -> None:
    host = (await shown.host()).encode()
    shown.listener.heard.clear()
    one = (
        b"POST /%s HTTP/1.0\r\nHost: " + host
        + b"\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n"
    )  # fmt: skip
    for length in (0, 9):
        reader, writer = await shown.opened.knock()
        writer.write(one % (b"first", 0) + one % (b"second", length))
        async with asyncio.timeout(SOON_S):
            said = await reader.read()
        writer.close()
        assert said.count(b"HTTP/1.1 200") == 1
    assert await shown.opened.is_well()
    assert not any("second" in one for one in shown.listener.heard)


async def test_trailers_pass_both_ways_but_for_what_may_not_be_one(shown: Shown) -> None:
    reader, writer = await shown.opened.knock()
    host = (await shown.host()).encode()

    async def whole(until: bytes) -> bytes:
        async with asyncio.timeout(SOON_S):
            return await reader.readuntil(until)

    for _ in range(2):  # on one connection, which goes on after them
        writer.write(b"GET /chunks HTTP/1.1\r\nHost: " + host + b"\r\nTE: trailers\r\n\r\n")
        assert b"content-length" not in (await whole(b"\r\n\r\n")).lower()
        said = await whole(b"\r\n\r\n")
        assert said.endswith(b"0\r\nx-trailer: 1\r\n\r\n")
        assert "te: trailers" in shown.listener.heard[-1].lower()
    writer.write(
        b"POST /trailing HTTP/1.1\r\nHost: " + host + b"\r\nTransfer-Encoding: chunked\r\n"
        b"Trailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 6\r\nAuthorization: Bearer x\r\n"
        b"X-Forwarded-For: 1.2.3.4\r\nHost: evil\r\n\r\n"
    )
    head = await whole(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    async with asyncio.timeout(SOON_S):
        body = await reader.readexactly(length)
    assert body == b"3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n"
    assert "trailer: x-sum" in shown.listener.heard[-1].lower()
    writer.write(b"HEAD /chunks HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    assert (await whole(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize("path", ["/ticking", "/big/500000000", "/silent", "/up", "/short"])
async def test_whoever_leaves_or_is_left_is_no_error(
    shown: Shown, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    caplog.set_level("INFO")
    host = (await shown.host()).encode()
    for reset in (False, True):
        shown.listener.left.clear()
        reader, writer = await shown.opened.knock()
        if path == "/up":
            writer.write(b"POST /up HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 90\r\n\r\nx")
        else:
            writer.write(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        await until(lambda: shown.listener.open == 1 or path == "/short")
        if path != "/silent" and path != "/up":
            async with asyncio.timeout(SOON_S):
                await reader.read(10)
        if reset:
            writer.transport.abort()
        writer.close()
        async with asyncio.timeout(SOON_S):
            await shown.listener.left.wait()
    await until(lambda: shown.listener.open == 0)
    assert [
        one.getMessage() for one in caplog.records if one.levelname in ("ERROR", "WARNING")
    ] == []


async def test_a_refused_upload_is_readable_for_whoever_sends_first(shown: Shown) -> None:
    host = shown.plain()
    size = 60 * 1024 * 1024

    def send_first(extra: bytes, method: bytes = b"POST") -> bytes:
        with socket.create_connection(("127.0.0.1", shown.opened.port), timeout=SOON_S) as there:
            there.sendall(
                method
                + b" /up HTTP/1.1\r\nHost: "
                + host.encode()
                + b"\r\n"
                + extra
                + b"Content-Length: %d\r\n\r\n" % size
            )
            for _ in range(size // 65536):
                there.sendall(bytes(65536))
            said = b""
            while b"\r\n\r\n" not in said:
                said += there.recv(65536)
            return said

    for extra in (b"Connection: close\r\n", b"", b"X-Large: " + b"x" * 70_000 + b"\r\n"):
        said = await asyncio.to_thread(send_first, extra)
        assert said.startswith(b"HTTP/1.1 431" if b"X-Large" in extra else b"HTTP/1.1 401"), extra
    assert await shown.opened.is_well()


async def test_events_come_at_once_and_end_with_their_listener(shown: Shown) -> None:
    async with (
        shown.client(await shown.host()) as client,
        client.stream("GET", "/events") as events,
        asyncio.timeout(SOON_S),
    ):
        assert await anext(events.aiter_raw()) == b"data: 1\n\n"
        assert not shown.listener.left.is_set()
    async with asyncio.timeout(SOON_S):
        await shown.listener.left.wait()


async def test_a_client_that_leaves_before_the_answer_leaves_nothing_behind(shown: Shown) -> None:
    reader, writer = await shown.opened.knock()
    writer.write(b"GET /silent HTTP/1.1\r\nHost: " + (await shown.host()).encode() + b"\r\n\r\n")
    await until(lambda: shown.listener.open == 1)
    writer.close()
    async with asyncio.timeout(SOON_S):
        await shown.listener.left.wait()
    del reader


async def test_where_cookies_and_redirects_of_a_guest_lead(shown: Shown) -> None:
    host = await shown.host()
    answer = await shown.get(host, "/cookies")
    assert answer.headers.get_list("set-cookie") == ["a=1"]
    assert answer.headers["location"] == f"http://{host}/next"


async def test_tiny_pieces_take_no_more_than_their_turn(shown: Shown) -> None:
    async with shown.client(await shown.host()) as client, asyncio.TaskGroup() as tasks:
        crumbs = tasks.create_task(client.get("/crumbs"))
        await until(lambda: bool(shown.listener.heard))
        for _ in range(20):
            await asyncio.sleep(0)
            assert await shown.opened.is_well()
        assert not crumbs.done()  # it is told of at its pace, and others are served meanwhile
        crumbs.cancel()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/garbage", "not in HTTP"),
        ("/nothing", "closed the connection without an answer"),
        ("/endless", "not in HTTP"),
    ],
)
async def test_a_guest_that_speaks_no_http_is_told_of(shown: Shown, path: str, said: str) -> None:
    answer = await shown.get(await shown.host(), path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "bad_gateway")
    assert said in answer.json()["error"]["message"]


async def test_half_an_answer_is_not_taken_for_a_whole_one(shown: Shown) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await shown.get(await shown.host(), "/short")


async def test_a_port_where_nothing_listens_has_a_page_that_looks_again(shown: Shown) -> None:
    host = await shown.host(CLOSED)
    page = await shown.get(host, "/", Accept="text/html")
    assert page.status_code == 502
    assert f"Nothing listens on port {CLOSED}" in page.text
    assert '<meta http-equiv="refresh"' in page.text
    assert (await shown.get(host)).json()["error"]["code"] == "bad_gateway"


async def test_a_slow_reader_holds_no_more_than_a_little(tmp_path: Path) -> None:
    async with listening() as (listener, port):
        conduct = Conduct(ports={PORT: port})
        async with door(tmp_path, saves=True, conduct=conduct, patience=BRIEF) as opened:
            found = Shown(opened, listener, await opened.yard.create())
            host = (await found.host()).encode()
            # Not before: a connection on which no head comes is soon closed, too.
            _, writer = await opened.knock()
            writer.write(b"GET /big/1073741824 HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
            async with asyncio.timeout(SOON_S):
                await listener.left.wait()
            # It was cut off when the buffers on the way were full, long before a gigabyte was read.
            assert listener.spilled < 2**26
            writer.close()


# --- sleep and death --------------------------------------------------------------------------


async def test_a_paused_sandbox_is_woken_and_one_that_may_not_be_says_so(shown: Shown) -> None:
    yard, host = shown.opened.yard, await shown.host()
    await yard.act(shown.box, "pause")
    assert (await shown.get(host)).status_code == 200
    assert (await yard.get(shown.box))["lastActivityKind"] == "preview"
    await yard.client.patch(f"/v1/sandboxes/{shown.box['id']}", json={"autoResume": False})
    await yard.act(shown.box, "pause")
    page = await shown.get(host, "/", Accept="text/html")
    assert (page.status_code, "does not run" in page.text) == (409, True)
    await yard.client.delete(f"/v1/sandboxes/{shown.box['id']}")
    assert (await shown.get(host)).status_code == 404


async def test_what_is_open_ends_when_the_sandbox_does(shown: Shown) -> None:
    async with (
        shown.client(await shown.host()) as client,
        client.stream("GET", "/events") as events,
    ):
        feed = events.aiter_raw()
        await anext(feed)
        await shown.opened.yard.act(shown.box, "pause")
        with pytest.raises(httpx.RemoteProtocolError):
            async with asyncio.timeout(SOON_S):
                await anext(feed)


async def test_it_is_in_use_while_bytes_come_and_go(shown: Shown) -> None:
    yard = shown.opened.yard
    await yard.client.patch(f"/v1/sandboxes/{shown.box['id']}", json={"idleTimeout": 3})
    async with (
        shown.client(await shown.host()) as client,
        client.stream("GET", "/ticking") as ticks,
    ):
        told = 0
        async for _ in ticks.aiter_raw():  # for much longer than it may be idle
            told += 1
            if told == 70:
                break
    assert await _is(yard, shown.box, "running")
    async with (
        shown.client(await shown.host()) as client,
        client.stream("GET", "/events") as events,
    ):
        await anext(events.aiter_raw())
        # Open and silent is no use of it.
        await eventually(lambda: _is(yard, shown.box, "paused"))


async def _is(yard: Any, box: dict[str, Any], status: str) -> bool:
    return bool((await yard.get(box))["status"] == status)


# --- WebSockets -------------------------------------------------------------------------------


@asynccontextmanager
async def echoing(shown: Shown) -> AsyncIterator[list[ServerConnection]]:
    """Have a WebSocket server that says everything back listen in the sandbox."""
    met: list[ServerConnection] = []

    async def echo(socket: ServerConnection) -> None:
        met.append(socket)
        async for message in socket:
            await socket.send(message)

    def choose(_: ServerConnection, offered: Any) -> Any:
        return "two" if "two" in offered else None

    async with websocket_server(
        echo,
        "127.0.0.1",
        0,
        subprotocols=[Subprotocol("two")],
        select_subprotocol=choose,
        max_size=2**26,
    ) as server:
        shown.opened.yard.conduct.ports[SOCKETS] = server.sockets[0].getsockname()[1]
        yield met


async def test_a_websocket_goes_through_as_it_is(shown: Shown) -> None:
    host = await shown.host(SOCKETS)
    async with echoing(shown) as met:
        origin: Any = f"http://{host}"
        subprotocols: Any = ["one", "two"]
        async with shown.socket(
            host, "/live?a=b", subprotocols=subprotocols, origin=origin, max_size=2**26
        ) as socket:
            assert socket.subprotocol == "two"
            assert met[0].request is not None
            assert met[0].request.path == "/live?a=b"
            assert met[0].request.headers["origin"] == f"http://localhost:{SOCKETS}"
            assert met[0].request.headers["host"] == f"localhost:{SOCKETS}"
            for size in (0, 1, 1024 * 1024, 5 * 1024 * 1024):
                await socket.send(b"x" * size)
                async with asyncio.timeout(SOON_S):
                    assert len(await socket.recv()) == size
            await socket.send("text é")
            assert await socket.recv() == "text é"
            await socket.close(4001, "done")
        await met[0].wait_closed()
        assert (met[0].close_code, met[0].close_reason) == (4001, "done")


async def test_a_websocket_needs_what_any_request_needs(shown: Shown) -> None:
    async with echoing(shown):
        host, token = (
            shown.plain(SOCKETS),
            (await shown.url(SOCKETS, access="cookie")).split("=")[1],
        )
        key = {"Authorization": f"Bearer {shown.opened.yard.key}"}
        async with shown.socket(host, additional_headers=key) as socket:
            await socket.send("1")
            assert await socket.recv() == "1"
        async with shown.socket(host, f"/?rt_token={token}") as socket:
            await socket.send("2")
            assert await socket.recv() == "2"
        cookie = {"Cookie": f"sandyard_preview={token}"}
        async with shown.socket(host, additional_headers=cookie, origin=f"http://{host}") as socket:
            await socket.send("3")
            assert await socket.recv() == "3"
        for path, options, status in (
            ("/", {}, 401), ("/?rt_token=x", {}, 401),
            ("/", {"additional_headers": cookie, "origin": "http://evil.preview.localhost"}, 401),
        ):  # fmt: skip
            with pytest.raises(InvalidStatus) as refused:
                async with shown.socket(host, path, **options):
                    pass
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body)["error"]["code"]
        for port, status in ((CLOSED, 502), (PORT, 200)):  # PORT answers as to any request
            with pytest.raises(InvalidStatus) as refused:
                async with shown.socket(await shown.host(port)):
                    pass
            assert refused.value.response.status_code == status


async def test_a_websocket_ends_when_the_sandbox_does(shown: Shown) -> None:
    async with echoing(shown), shown.socket(await shown.host(SOCKETS)) as socket:
        await socket.send("1")
        await socket.recv()
        await shown.opened.yard.client.delete(f"/v1/sandboxes/{shown.box['id']}")
        with pytest.raises(ConnectionClosed):
            async with asyncio.timeout(SOON_S):
                await socket.recv()


async def test_two_hundred_idle_websockets_are_held_and_let_go(shown: Shown) -> None:
    host = await shown.host(SOCKETS)
    async with echoing(shown) as met:
        opened = []
        for _ in range(10):  # a few at a time, as a Unix socket takes them
            opened += await asyncio.gather(
                *(
                    connect(f"ws://{host}", host="127.0.0.1", port=shown.opened.port, proxy=None)
                    for _ in range(20)
                )
            )
        await opened[-1].send("still there")
        assert await opened[-1].recv() == "still there"
        assert len(met) == 200
        await asyncio.gather(*(one.close() for one in opened))
        await until(lambda: all(one.state.name == "CLOSED" for one in met))
