"""A second API is one folder and one registration, and changes nothing for the first."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from sandyard.server.app.settings import HttpSettings
from tests.second_face.app import DOMAIN, make_second_face
from tests.support.house import Yard, open_yard

API = "http://api.sandyard.test"
SECTIONS = {"http": HttpSettings(hosts=("api.sandyard.test",))}


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    async with open_yard(tmp_path, sections=SECTIONS, faces=[make_second_face]) as opened:
        yield opened


def client_of(yard: Yard, host: str, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(yard.house.front, raise_app_exceptions=False)
    return httpx.AsyncClient(
        transport=transport, base_url=f"http://{host}", headers=headers, timeout=30
    )


def key_of(yard: Yard) -> str:
    return "second_" + yard.key.removeprefix("rt_")


@pytest.mark.parametrize("host", [f"api.{DOMAIN}", DOMAIN, f"49983-x.box.{DOMAIN}:8443"])
async def test_it_creates_a_sandbox_and_runs_a_command(yard: Yard, host: str) -> None:
    async with client_of(yard, host, **{"Second-Key": key_of(yard)}) as client:
        made = await client.post("/boxes", json={"sleepAfter": 60})
        assert (made.status_code, made.json()["ok"]) == (201, True)
        ran = await client.post(f"/boxes/{made.json()['box']}/run", json={"line": "echo hello"})
        assert ran.json() == {"ok": True, "printed": "echo hello"}
        assert ran.headers["x-request-id"].startswith("req_")
        assert int(ran.headers["x-ratelimit-limit"]) > 0
    async with client_of(yard, "api.sandyard.test", Authorization=f"Bearer {yard.key}") as first:
        (shown,) = (await first.get("/v1/sandboxes")).json()["data"]
        assert (shown["id"], shown["idleTimeout"]) == (made.json()["box"], 60)


async def test_errors_come_in_its_envelope_with_its_field_names(yard: Yard) -> None:
    async with client_of(yard, f"api.{DOMAIN}", **{"Second-Key": key_of(yard)}) as client:
        refused = await client.post("/boxes", json={"sleepAfter": -1})
        assert refused.status_code == 422
        assert refused.json()["ok"] is False
        assert refused.json()["problem"].startswith("cannot use sleepAfter:")
        absent = await client.post("/boxes/sandbox-aaaaaaaaaaaa/run", json={"line": "true"})
        assert absent.status_code == 404
        other_type = await client.post("/boxes", content=b"x", headers={"Content-Type": "text/x"})
        assert other_type.status_code == 422
    async with client_of(yard, "api.sandyard.test", Authorization=f"Bearer {yard.key}") as first:
        refused = await first.post("/v1/sandboxes", json={"idleTimeout": -1})
        assert refused.status_code == 400
        assert refused.json()["error"]["details"]["field"] == "idleTimeout"
        assert "idleTimeout" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "without a credential"),
        ({"Second-Key": "rt_live_x"}, "does not begin with second_"),
        ({"Second-Key": "second_live_x"}, "unknown"),
        ({"Authorization": "Bearer KEY"}, "without a credential"),
    ],
)
async def test_it_takes_its_own_credentials_only(
    yard: Yard, headers: dict[str, str], problem: str
) -> None:
    given = {name: value.replace("KEY", yard.key) for name, value in headers.items()}
    async with client_of(yard, f"api.{DOMAIN}", **given) as client:
        refused = await client.post("/boxes", json={})
    assert refused.status_code == 400
    assert problem in refused.json()["problem"]


async def test_neither_api_answers_at_the_others_hosts(yard: Yard) -> None:
    both = {"Second-Key": key_of(yard), "Authorization": f"Bearer {yard.key}"}
    async with client_of(yard, f"api.{DOMAIN}", **both) as client:
        assert (await client.get("/v1/sandboxes")).status_code == 404
    async with client_of(yard, "api.sandyard.test", **both) as client:
        assert (await client.get("/v1/sandboxes")).status_code == 200
        assert (await client.post("/boxes", json={})).status_code == 404


@pytest.mark.parametrize(
    "host", ["evil.test", "sandyard.test", "api.sandyard.test.evil.test", "xsecond.test", ""]
)
async def test_a_host_that_no_face_owns_is_misdirected(yard: Yard, host: str) -> None:
    async with client_of(yard, "x", Host=host, Authorization=f"Bearer {yard.key}") as client:
        for path in ("/v1/sandboxes", "/", "/boxes", "/healthz"):
            answer = await client.get(path)
            assert answer.status_code == 421, path
            assert answer.json()["error"]["code"] == "misdirected_request"


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "[::1]:8080", "localhost", "LOCALHOST."])
async def test_addresses_and_localhost_lead_to_the_api(yard: Yard, host: str) -> None:
    async with client_of(yard, "x", Host=host) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert "Sandyard" in (await client.get("/")).text


async def test_requests_are_counted_by_face(yard: Yard) -> None:
    async with client_of(yard, f"api.{DOMAIN}", **{"Second-Key": key_of(yard)}) as client:
        await client.post("/boxes", json={})
    async with client_of(yard, "api.sandyard.test") as client:
        metrics = (await client.get("/metrics")).text
    assert 'face="second",method="POST",route="/boxes",status="201"' in metrics
