"""The control API of E2B, on fake machines."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.e2b import create
from tests.support.house import EACH_STORE, Yard, eventually, open_yard, store_section

from sandyard.server.app.settings import E2bSettings
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.records import Sandbox
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status
from sandyard.server.e2b.control.models import state_of
from sandyard.server.fakes.driver import Conduct


@pytest.fixture(params=EACH_STORE)
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    async with (
        store_section(request.param) as sections,
        open_yard(tmp_path, saves=True, sections=sections) as opened,
    ):
        yield opened


@pytest.fixture
async def client(yard: Yard) -> AsyncIterator[httpx.AsyncClient]:
    made = await yard.client.post("/v1/api-keys", json={"name": "e2b", "format": "e2b"})
    key = made.json()["data"]["key"]
    assert re.fullmatch("e2b_[0-9a-f]{40}", key)
    async with yard.client_of(None) as opened:
        opened.headers["X-API-Key"] = key
        yield opened


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def info(client: httpx.AsyncClient, box_id: str) -> dict[str, Any]:
    answer = await client.get(f"/sandboxes/{box_id}")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_a_sandbox_is_created_and_shown_by_both_apis(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    box = await create(
        client, timeout=77, metadata={"a": "b"}, envVars={"A": "1"}, autoPause=True,
        autoResume={"enabled": True}, network={"maskRequestHost": "localhost:${PORT}"},
        secure=True, mcp=None, unheardOf={"x": 1},
    )  # fmt: skip
    assert box.told["envdVersion"] == "0.6.13"
    assert (box.told["templateID"], box.told["alias"]) == ("base-minimal", "base-minimal")
    assert box.told["domain"] == "sandyard.test"
    assert box.told["trafficAccessToken"] not in ("", box.token)
    told = await info(client, box.id)
    assert told["state"] == "running"
    assert told["metadata"] == {"a": "b"}
    assert told["lifecycle"] == {"autoResume": True, "onTimeout": "pause"}
    assert told["network"] == {
        "allowPublicTraffic": True, "maskRequestHost": "localhost:${PORT}"
    }  # fmt: skip
    assert (told["cpuCount"], told["envdAccessToken"]) == (1, box.token)
    assert lives_s(told) >= 77, "from when it runs"
    (shown,) = (await yard.client.get("/v1/sandboxes")).json()["data"]
    assert (shown["idleTimeout"], shown["onExpiry"], shown["autoResume"]) == (0, "pause", True)


def lives_s(told: Mapping[str, Any]) -> float:
    return (at(told["endAt"]) - at(told["startedAt"])).total_seconds()


async def test_a_sandbox_that_starts_slowly_lives_as_long(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    yard.conduct.start_delay_s = 2
    made = await client.post("/sandboxes", json={"templateID": "base-minimal", "timeout": 60})
    assert lives_s(await info(client, made.json()["sandboxID"])) >= 62


@pytest.mark.parametrize(("path", "seconds"), [("/v2/sandboxes", 300), ("/sandboxes", 15)])
async def test_older_clients_have_another_timeout(
    client: httpx.AsyncClient, path: str, seconds: int
) -> None:
    made = await client.post(path, json={"templateID": "base-minimal"})
    told = await info(client, made.json()["sandboxID"])
    assert lives_s(told) >= seconds
    assert told["lifecycle"] == {"autoResume": False, "onTimeout": "kill"}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "templateID"),
        ({"templateID": 7}, 400, "templateID"),
        ({"templateID": ""}, 400, "templateID"),
        ({"templateID": "no-such"}, 404, "no-such"),
        ({"templateID": "../etc"}, 404, "../etc"),
        ({"templateID": "base-minimal:v9"}, 404, "v9"),
        ({"templateID": "builder"}, 404, "builder"),
        ({"timeout": 0}, 400, "timeout"),
        ({"timeout": -1}, 400, "timeout"),
        ({"timeout": "60"}, 400, "timeout"),
        ({"timeout": 10**9}, 400, "timeout"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": []}, 400, "metadata"),
        ({"metadata": {"a": "x" * 20_000}}, 400, "metadata"),
        ({"metadata": {"a": "\x00"}}, 400, "metadata"),
        ({"envVars": {"1A": "x"}}, 400, "1A"),
        ({"envVars": {"A": "\x00"}}, 400, "envVars"),
        ({"volumeMounts": [{"name": "a", "path": "/a"}]}, 400, "volumeMounts"),
        ({"iam": {"tokens": {"a": {}}}}, 400, "iam"),
        # The SDK names a template of its own with it, which is not here.
        ({"templateID": "mcp-gateway", "mcp": {"github": {"token": "x"}}}, 400, "mcp"),
        ({"autoPauseMemory": False}, 400, "autoPauseMemory"),
        (
            {"autoPause": True, "autoPauseMemory": False, "autoResume": {"enabled": True}},
            400,
            "autoPauseMemory",
        ),
        ({"network": {"allowOut": ["example.com"]}}, 400, "network.allowOut"),
        ({"network": {"allowOut": ["*"], "denyOut": ["0.0.0.0/0"]}}, 400, "network.allowOut"),
        ({"network": {"denyOut": ["example.com"]}}, 400, "network.denyOut"),
        ({"network": {"rules": {"a": [{"transform": {"headers": {"Host": "b"}}}]}}}, 400, "Host"),
        ({"network": {"rules": {"a.test": [5]}}}, 400, "rules"),
        ({"network": {"maskRequestHost": "a\r\nX: y"}}, 400, "maskRequestHost"),
        ({"network": {"egressProxy": {}, "dnsServers": ["1.1.1.1"]}}, 400, "network.dnsServers"),
    ],
)
async def test_what_cannot_be_created_is_refused_by_name(
    yard: Yard, client: httpx.AsyncClient, body: dict[str, Any], status: int, field: str
) -> None:
    given = body if "templateID" in body or not body else {"templateID": "base-minimal", **body}
    answer = await client.post("/v2/sandboxes", json=given)
    assert answer.status_code == status, answer.text
    assert answer.json()["code"] == status
    assert field in answer.json()["message"]
    assert (await yard.client.get("/v1/sandboxes")).json()["data"] == []


@pytest.mark.parametrize("content", [b"[]", b"{", b"1", b"\xff", b'{"a":' * 100_000])
async def test_bodies_that_are_no_objects_are_refused(
    client: httpx.AsyncClient, content: bytes
) -> None:
    answer = await client.post(
        "/v2/sandboxes", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 413), answer.text
    assert isinstance(answer.json()["message"], str)


async def test_an_unsupported_field_that_is_empty_is_no_wish(client: httpx.AsyncClient) -> None:
    await create(
        client, volumeMounts=[], iam={"tokens": {}}, allowInternetAccess=True,
        network={"allowOut": [], "rules": {}}, autoPauseMemory=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "rules"),
    [
        ({"allowInternetAccess": False}, ("deny", [], [])),
        ({"allow_internet_access": False}, ("deny", [], [])),
        ({"network": {"denyOut": ["0.0.0.0/0"], "allowOut": ["8.8.8.8", "*.a.test"]}},
         ("deny", ["8.8.8.8/32", "*.a.test"], [])),
        ({"network": {"denyOut": ["1.2.3.0/24"]}}, ("allow", [], ["1.2.3.0/24"])),
        ({"network": {"allowOut": ["1.1.1.1"]}}, ("allow", ["1.1.1.1/32"], [])),
    ],
)  # fmt: skip
async def test_network_rules_are_those_of_the_other_api(
    yard: Yard, client: httpx.AsyncClient, asked: dict[str, Any], rules: tuple[str, Any, Any]
) -> None:
    box = (await create(client, **asked)).id
    found = (await yard.client.get(f"/v1/sandboxes/{box}/network")).json()["data"]
    assert (found["egress"], found["allow"], found["deny"]) == rules
    told = (await client.get(f"/sandboxes/{box}")).json()
    assert told["allowInternetAccess"] is (rules[0] == "allow")
    # Replaced as a whole, and what is left out is cleared.
    answer = await client.put(f"/sandboxes/{box}/network", json={"denyOut": ["9.9.9.9"]})
    assert answer.status_code == 204
    told = (await client.get(f"/sandboxes/{box}")).json()["network"]
    assert (told["allowOut"], told["denyOut"]) == ([], ["9.9.9.9/32"])
    assert (await client.put(f"/sandboxes/{box}/network", json={})).status_code == 204
    assert "denyOut" not in (await client.get(f"/sandboxes/{box}")).json()["network"]


async def test_header_rules_are_those_of_the_other_api(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    secret = {"name": "TOKEN", "value": "hidden", "hosts": ["*.a.test"]}
    assert (await yard.client.post("/v1/secrets", json=secret)).status_code == 201
    rules = {
        "api.a.test": [
            {"transform": {"headers": {"X-A": "1", "X-B": "${TOKEN}"}}},
            {"transform": {"headers": {"X-A": "2"}}},
            {},
        ],
        "other.test": [],
    }
    network = {"allowOut": ["api.a.test"], "denyOut": ["0.0.0.0/0"], "rules": rules}
    box = (await create(client, network=network)).id
    found = (await yard.client.get(f"/v1/sandboxes/{box}/network")).json()["data"]
    headers = {"X-A": "2", "X-B": "${TOKEN}"}
    assert found["inject"] == [{"host": "api.a.test", "headers": headers}]
    told = (await client.get(f"/sandboxes/{box}")).json()["network"]
    assert told["rules"] == {"api.a.test": [{"transform": {"headers": headers}}]}
    answer = await client.put(f"/sandboxes/{box}/network", json={"rules": rules})
    assert answer.status_code == 204
    assert (await client.get(f"/sandboxes/{box}")).json()["network"]["allowOut"] == []
    identity = {"a.test": [{"transform": {"headers": {"A": "${e2b.identity.tokens.aws}"}}}]}
    answer = await client.put(f"/sandboxes/{box}/network", json={"rules": identity})
    assert (answer.status_code, "a secret is written as" in answer.text) == (400, True)


async def test_credentials(yard: Yard, client: httpx.AsyncClient) -> None:
    box = await create(client)
    async with yard.client_of(None) as nobody:
        for key in (None, "e2b_" + "0" * 40, "e2b_", "x", box.token):
            headers = {} if key is None else {"X-API-Key": key}
            for path in ("/v2/sandboxes", f"/sandboxes/{box.id}"):
                answer = await nobody.get(path, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (401, 401)
    async with yard.client_of(None) as stranger:
        stranger.headers["X-API-Key"] = await yard.stranger()
        assert (await stranger.get(f"/sandboxes/{box.id}")).status_code == 404
        assert (await stranger.delete(f"/sandboxes/{box.id}")).status_code == 404
        assert (await stranger.get("/v2/sandboxes")).json() == []
    org_id, user_id = await yard.first()
    async with yard.client_of(None) as reader:
        reader.headers["X-API-Key"] = await yard.add_key(org_id, user_id, scopes=("sandbox:read",))
        assert (await reader.get(f"/sandboxes/{box.id}")).status_code == 200
        refused = await reader.post("/v2/sandboxes", json={"templateID": "base-minimal"})
        assert (refused.status_code, refused.json()["code"]) == (403, 403)
        assert (await reader.delete(f"/sandboxes/{box.id}")).status_code == 403
    # The key is one for the other API, too.
    bearer = {"Authorization": f"Bearer {client.headers['X-API-Key']}"}
    async with yard.client_of(None) as other:
        assert (await other.get("/v1/sandboxes", headers=bearer)).status_code == 200


async def test_the_token_of_a_sandbox_is_for_those_who_may_use_it(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    box = await create(client)
    org_id, user_id = await yard.first()
    async with yard.client_of(None) as reader:
        for scopes in (("sandbox:read",), ("sandbox:create", "sandbox:read")):
            reader.headers["X-API-Key"] = await yard.add_key(org_id, user_id, scopes=scopes)
            told = await info(reader, box.id)
            assert "envdAccessToken" not in told
            assert str(box.token) not in (await reader.get("/v2/sandboxes")).text
            for path in ("/v2/sandboxes", f"/v2/sandboxes/{box.id}/connect"):
                refused = await reader.post(path, json={"templateID": "base-minimal"})
                assert refused.status_code == 403


async def test_the_same_request_again_deletes_nothing(client: httpx.AsyncClient) -> None:
    body, headers = {"templateID": "base-minimal"}, {"Idempotency-Key": "once"}
    first = await client.post("/v2/sandboxes", json=body, headers=headers)
    box_id = first.json()["sandboxID"]
    await client.post(f"/sandboxes/{box_id}/pause")
    again = await client.post("/v2/sandboxes", json=body, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert (await info(client, box_id))["state"] == "paused"
    await client.delete(f"/sandboxes/{box_id}")
    late = await client.post("/v2/sandboxes", json=body, headers=headers)
    assert late.status_code == 404


async def test_of_several_connects_the_longest_counts(client: httpx.AsyncClient) -> None:
    box = await create(client, timeout=60)
    await client.post(f"/sandboxes/{box.id}/pause")
    path = f"/v2/sandboxes/{box.id}/connect"
    timeouts = (20, 3600, 40)
    answers = await asyncio.gather(*(client.post(path, json={"timeout": one}) for one in timeouts))
    assert {one.status_code for one in answers} <= {200, 201}
    left = at((await info(client, box.id))["endAt"]) - datetime.now(UTC)
    assert left > timedelta(seconds=3500)


async def test_a_connect_saves_a_sandbox_whose_end_has_just_come(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True) as yard:
        yard.client.headers["X-API-Key"] = yard.key
        box = await create(yard.client, timeout=100, autoPause=True)
        # As it is between its end and the moment when somebody sees that.
        async with yard.house.store.write(Turn.ALONE) as tx:
            row = await tx.sandboxes.find(box.id)
            assert row is not None
            await tx.sandboxes.replace(
                replace(row, expires_at=datetime.now(UTC) - timedelta(seconds=1))
            )
        answer = await yard.client.post(f"/v2/sandboxes/{box.id}/connect", json={"timeout": 600})
        assert answer.status_code in (200, 201), answer.text
        left = at((await info(yard.client, box.id))["endAt"]) - datetime.now(UTC)
        assert left > timedelta(seconds=500)
        assert (await box.run("echo"))[1] == {}


async def test_a_rotated_key_keeps_its_form(yard: Yard) -> None:
    made = await yard.client.post("/v1/api-keys", json={"name": "e2b", "format": "e2b"})
    again = await yard.client.post(f"/v1/api-keys/{made.json()['data']['id']}/rotate")
    assert re.fullmatch("e2b_[0-9a-f]{40}", again.json()["data"]["key"])


async def test_a_key_and_its_idempotency_key(yard: Yard, client: httpx.AsyncClient) -> None:
    body, headers = {"templateID": "base-minimal"}, {"Idempotency-Key": "abc-1"}
    one = await client.post("/v2/sandboxes", json=body, headers=headers)
    two = await client.post("/v2/sandboxes", json=body, headers=headers)
    assert one.json()["sandboxID"] == two.json()["sandboxID"]
    other = await client.post("/v2/sandboxes", json={**body, "timeout": 9}, headers=headers)
    assert other.status_code == 422
    assert other.json()["error_code"] == "idempotency_request_mismatch"
    for wrong in ("A", "", "x" * 256, "a_b"):
        refused = await client.post("/v2/sandboxes", json=body, headers={"Idempotency-Key": wrong})
        assert refused.status_code == 400, wrong
    assert len((await yard.client.get("/v1/sandboxes")).json()["data"]) == 1


async def test_the_end_is_put_off_by_a_connect_and_set_by_a_timeout(
    client: httpx.AsyncClient,
) -> None:
    box = await create(client, timeout=100)
    first = at((await info(client, box.id))["endAt"])
    for path, timeout in (("/v2", 10), ("/v2", 50), ("", 10)):
        answer = await client.post(f"{path}/sandboxes/{box.id}/connect", json={"timeout": timeout})
        assert (answer.status_code, answer.json()["envdAccessToken"]) == (200, box.token)
        assert at((await info(client, box.id))["endAt"]) == first
    await client.post(f"/v2/sandboxes/{box.id}/connect", json={"timeout": 1000})
    later = at((await info(client, box.id))["endAt"])
    assert later > first + timedelta(seconds=800)
    assert (
        await client.post(f"/sandboxes/{box.id}/refreshes", json={"duration": 60})
    ).status_code == 204
    assert at((await info(client, box.id))["endAt"]) == later
    assert (
        await client.post(f"/sandboxes/{box.id}/timeout", json={"timeout": 30})
    ).status_code == 204
    assert at((await info(client, box.id))["endAt"]) < later
    for wrong in (-1, "1", 10**9, None):
        refused = await client.post(f"/sandboxes/{box.id}/timeout", json={"timeout": wrong})
        assert refused.status_code == 400, wrong
    assert (await client.post(f"/sandboxes/{box.id}/timeout", json={})).status_code == 400


@pytest.mark.parametrize(("pauses", "state"), [(False, None), (True, "paused")])
async def test_a_timeout_of_zero_is_the_end(
    client: httpx.AsyncClient, pauses: bool, state: str | None
) -> None:
    box = await create(client, autoPause=pauses)
    assert (
        await client.post(f"/sandboxes/{box.id}/timeout", json={"timeout": 0})
    ).status_code == 204
    answer = await client.get(f"/sandboxes/{box.id}")
    assert answer.status_code == (404 if state is None else 200)
    assert answer.json().get("state") == state


async def test_a_paused_sandbox_has_no_end_until_it_runs_again(
    client: httpx.AsyncClient,
) -> None:
    box = await create(client, timeout=200)
    assert (await client.post(f"/sandboxes/{box.id}/pause")).status_code == 204
    told = await info(client, box.id)
    assert told["state"] == "paused"
    assert at(told["endAt"]) < datetime.now(UTC) + timedelta(seconds=60)
    assert (await client.post(f"/sandboxes/{box.id}/pause")).status_code == 409
    absent = await client.post(f"/sandboxes/{box.id}/timeout", json={"timeout": 5})
    assert absent.status_code == 404
    again = await client.post(f"/v2/sandboxes/{box.id}/connect", json={"timeout": 30})
    assert (again.status_code, again.json()["envdAccessToken"]) == (201, box.token)
    left = at((await info(client, box.id))["endAt"]) - datetime.now(UTC)
    assert timedelta(seconds=20) < left < timedelta(seconds=31)
    assert (await client.post(f"/sandboxes/{box.id}/resume", json={})).status_code == 409


async def test_the_first_timeout_comes_again_after_a_resume_by_the_other_api(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    box = await create(client, timeout=200)
    await client.post(f"/sandboxes/{box.id}/pause", json={"memory": True})
    (shown,) = (await yard.client.get("/v1/sandboxes")).json()["data"]
    assert (shown["status"], shown["expiresAt"]) == ("paused", None)
    await yard.client.post(f"/v1/sandboxes/{box.id}/resume")
    left = at((await info(client, box.id))["endAt"]) - datetime.now(UTC)
    assert timedelta(seconds=150) < left < timedelta(seconds=201)


async def test_a_pause_without_memory_boots_the_sandbox_from_its_disk(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    box = await create(client, timeout=200, autoPause=True, autoPauseMemory=False)
    processes = f"/v1/sandboxes/{box.id}/processes"

    async def paused(**body: object) -> str:
        assert (await yard.client.post(processes, json={"argv": ["hang"]})).status_code == 201
        assert (await client.post(f"/sandboxes/{box.id}/pause", json=body)).status_code == 204
        return str((await info(client, box.id))["pauseMode"])

    async def kept(timeout: int, **body: object) -> int:
        """Connect, and return how many processes are left."""
        answer = await client.post(
            f"/v2/sandboxes/{box.id}/connect", json={"timeout": timeout, **body}
        )
        assert (answer.status_code, answer.json()["envdAccessToken"]) == (201, box.token)
        told = await info(client, box.id)
        assert "pauseMode" not in told
        left_s = (at(told["endAt"]) - datetime.now(UTC)).total_seconds()
        assert timeout - 10 < left_s < timeout + 1
        return len((await yard.client.get(processes)).json()["data"])

    assert await paused() == "full"
    assert await kept(100) == 1
    assert await paused(memory=False) == "filesystem"
    assert await kept(30) == 0
    # Whatever the pause has saved, its client may want none of it.
    assert await paused(memory=True) == "full"
    assert await kept(40, memory=False) == 0


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "snapshots", {"memory": False}),
        ("POST", "fork", {"count": 0}),
        ("POST", "fork", {"count": 21}),
        ("POST", "fork", {"timeout": 0}),
        ("POST", "connect", {"timeout": 0}),
    ],
)
async def test_what_cannot_be_done_with_a_sandbox_is_refused(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any]
) -> None:
    box = await create(client)
    answer = await client.request(method, f"/sandboxes/{box.id}/{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert next(iter(body)) in answer.json()["message"]


async def test_killed_is_gone(client: httpx.AsyncClient) -> None:
    box = await create(client)
    assert (await client.delete(f"/sandboxes/{box.id}")).status_code == 204
    for method, path in (
        ("DELETE", ""), ("GET", ""), ("POST", "/pause"), ("POST", "/connect"),
        ("POST", "/timeout"), ("POST", "/fork"), ("POST", "/snapshots"), ("GET", "/metrics"),
    ):  # fmt: skip
        body = {"timeout": 5} if path == "/timeout" else {}
        given = body if method == "POST" else None
        answer = await client.request(method, f"/sandboxes/{box.id}{path}", json=given)
        assert (answer.status_code, answer.json()["code"]) == (404, 404), path
    for absent in ("sandbox-aaaaaaaaaaaa", "nonsense", "a b"):
        assert (await client.get(f"/sandboxes/{absent}")).status_code == 404


async def test_a_sandbox_ends_at_its_end(client: httpx.AsyncClient) -> None:
    box = await create(client, timeout=1)
    kept = await create(client, timeout=1, autoPause=True)

    async def is_over() -> bool:
        return (await client.get(f"/sandboxes/{box.id}")).status_code == 404

    async def is_paused() -> bool:
        return bool((await info(client, kept.id))["state"] == "paused")

    await eventually(is_over)
    await eventually(is_paused)
    for one in (box, kept):
        assert (await client.get("/health", headers=one.headers())).status_code == 502
        gone = await one.call("process.Process/List", {})
        assert (gone.status_code, gone.json()["message"]) == (502, "The sandbox was not found")
    assert (await client.get("/v2/sandboxes", params={"state": "running"})).json() == []


def test_a_sandbox_past_its_end_is_gone_before_anyone_has_looked() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    one = Sandbox(
        "sandbox-aaaaaaaaaaaa", "o", "u", "p", None, Status.RUNNING, 1, 1, "base-minimal",
        Shape(1, 512, 1024), 0, now, now, expires_at=now + timedelta(seconds=5), lives_s=5,
    )  # fmt: skip
    for seconds, killed, paused in ((4.999, "running", "running"), (5, None, "paused")):
        then = now + timedelta(seconds=seconds)
        assert state_of(one, then) == killed
        assert state_of(replace(one, pauses_at_end=True), then) == paused
    assert state_of(replace(one, status=Status.PAUSED), now + timedelta(days=9)) == "paused"
    assert state_of(replace(one, status=Status.DESTROYING), now) is None


async def test_lists(yard: Yard, client: httpx.AsyncClient) -> None:
    made = []
    for number in range(5):
        metadata = {"number": str(number), "odd name": "a&b=c", "own": "ünï %41"}
        made.append((await create(client, metadata=metadata)).id)
    await client.post(f"/sandboxes/{made[1]}/pause")
    everything = await client.get("/v2/sandboxes")
    assert [one["sandboxID"] for one in everything.json()] == made[::-1]
    assert "x-next-token" not in everything.headers

    async def ids(path: str = "/v2/sandboxes", **query: Any) -> list[str]:
        answer = await client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return [one["sandboxID"] for one in answer.json()]

    assert await ids(state="paused") == [made[1]]
    assert await ids(state="running") == [made[4], made[3], made[2], made[0]]
    assert await ids(state="running,paused") == made[::-1]
    assert await ids(state=["running", "paused"]) == made[::-1]
    assert await ids("/sandboxes") == [made[4], made[3], made[2], made[0]]
    assert await ids(order="asc") == made
    # As clients write it: each name and value quoted, and then the whole.
    assert await ids(metadata="number=3&odd%2520name=a%2526b%253Dc") == [made[3]]
    assert await ids(metadata="own=%25C3%25BCn%25C3%25AF%2520%252541") == made[::-1]
    assert await ids(metadata="number=3&own=other") == []
    assert await ids(template="base-minimal") == made[::-1]
    assert await ids(template="other") == []
    starts = {one: (await info(client, one))["startedAt"] for one in made}
    assert set(await ids(startedAfter=starts[made[2]])) >= set(made[2:])
    later = (at(starts[made[4]]) + timedelta(seconds=1)).isoformat()
    assert await ids(startedAfter=later) == []
    for order in ("asc", "desc"):
        found: list[str] = []
        token = None
        while token is not None or not found:
            page = await client.get(
                "/v2/sandboxes",
                params={"limit": 2, "order": order, **({"nextToken": token} if token else {})},
            )
            found += [one["sandboxID"] for one in page.json()]
            token = page.headers.get("x-next-token")
        assert found == (made if order == "asc" else made[::-1])


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"state": "dead"}, {"order": "up"},
        {"startedAfter": "yesterday"}, {"nextToken": "x"},
        {"startedAfter": "0001-01-01T00:00:00+23:00"}, {"template": "a\x00"},
        {"metadata": "a=%2500"},
    ],
)  # fmt: skip
async def test_wrong_queries_are_refused_by_name(
    client: httpx.AsyncClient, query: dict[str, str]
) -> None:
    answer = await client.get("/v2/sandboxes", params=query)
    assert answer.status_code == 400, answer.text
    assert next(iter(query)) in answer.json()["message"]


async def test_snapshots_and_forks(client: httpx.AsyncClient) -> None:
    box = await create(client)
    made = await client.post(f"/sandboxes/{box.id}/snapshots", json={"name": "mine"})
    assert made.status_code == 201, made.text
    snapshot = made.json()
    assert snapshot["names"] == ["mine:default"]
    other = await create(client)
    unnamed = (await client.post(f"/sandboxes/{other.id}/snapshots", json={})).json()

    async def ids(**query: str) -> list[str]:
        found = await client.get("/snapshots", params=query)
        return [one["snapshotID"] for one in found.json()]

    assert await ids() == [unnamed["snapshotID"], snapshot["snapshotID"]]
    assert await ids(sandboxID=box.id) == [snapshot["snapshotID"]]
    assert await ids(name="mine") == await ids(name="team/mine:default")
    assert await ids(name="mine") == [snapshot["snapshotID"]]
    assert await ids(name="other") == []
    # A name that is taken moves to the new one.
    moved = (await client.post(f"/sandboxes/{other.id}/snapshots", json={"name": "mine"})).json()
    assert await ids(name="mine") == [moved["snapshotID"]]
    again = (await client.post(f"/sandboxes/{box.id}/snapshots", json={"name": "mine"})).json()
    await client.delete(f"/templates/{snapshot['snapshotID']}")
    assert await ids(name="mine") == [again["snapshotID"]]
    await client.delete(f"/templates/{moved['snapshotID']}")
    snapshot = again
    assert await ids() == [snapshot["snapshotID"], unnamed["snapshotID"]]
    first = await client.get("/snapshots", params={"limit": "1"})
    token = first.headers["x-next-token"]
    assert await ids(limit="1", nextToken=token) == [unnamed["snapshotID"]]
    for reference in (snapshot["snapshotID"], "mine", "mine:default"):
        await create(client, templateID=reference)
    forks = await client.post(f"/sandboxes/{box.id}/fork", json={"count": 2, "timeout": 44})
    assert forks.status_code == 201
    for one in forks.json():
        told = await info(client, one["sandbox"]["sandboxID"])
        assert at(told["endAt"]) - at(told["startedAt"]) == timedelta(seconds=44)
    for _ in range(2):  # once it is there, once not
        answer = await client.delete(f"/templates/{snapshot['snapshotID']}")
        assert answer.status_code in (204, 404)
    assert answer.status_code == 404


async def test_templates(client: httpx.AsyncClient) -> None:
    found = (await client.get("/templates")).json()
    assert "base-minimal" in [one["templateID"] for one in found]
    there = await client.get("/templates/aliases/base-minimal")
    assert there.json()["templateID"] == "base-minimal"
    assert (await client.get("/templates/aliases/no-such")).status_code == 404
    assert (await client.delete("/templates/base-minimal")).status_code == 404
    assert (await client.delete("/templates/no-such")).status_code == 404


async def test_metrics(client: httpx.AsyncClient) -> None:
    box = await create(client)
    (sample,) = (await client.get(f"/sandboxes/{box.id}/metrics")).json()
    assert (sample["cpuCount"], sample["memTotal"] > 0) == (1, True)
    past = {"start": "0", "end": "1000"}
    assert (await client.get(f"/sandboxes/{box.id}/metrics", params=past)).json() == []
    ahead = {"start": str(int(time.time()) + 60)}
    assert (await client.get(f"/sandboxes/{box.id}/metrics", params=ahead)).json() == []
    wrong = await client.get(f"/sandboxes/{box.id}/metrics", params={"start": "x"})
    assert wrong.status_code == 400


async def test_what_is_not_served_says_so(client: httpx.AsyncClient) -> None:
    assert (await client.get("/volumes")).status_code == 400
    assert (await client.post("/secrets", json={})).status_code == 501
    assert "volumes" in (await client.get("/volumes/x")).json()["message"]
    assert (await client.get("/sandboxes/x/unheard/of")).status_code == 404


async def test_a_sandbox_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    async with open_yard(tmp_path, conduct=Conduct(starts=False)) as yard:
        client = yard.client
        client.headers["X-API-Key"] = yard.key
        answer = await client.post("/v2/sandboxes", json={"templateID": "base-minimal"})
        assert answer.status_code == 503, answer.text
        assert "retry-after" in answer.headers
        # A client that tries again by itself has the same key, and a chance.
        for _ in range(3):
            again = await client.post(
                "/v2/sandboxes", json={"templateID": "base-minimal"},
                headers={"Idempotency-Key": "same"},
            )  # fmt: skip
            assert again.status_code == 503, again.text

        async def is_empty() -> bool:
            return not (await client.get("/v1/sandboxes")).json()["data"]

        await eventually(is_empty)


async def test_it_can_be_switched_off(tmp_path: Path) -> None:
    sections = {"e2b": E2bSettings(enabled=False)}
    async with open_yard(tmp_path, sections=sections) as yard:
        yard.client.headers["X-API-Key"] = yard.key
        answer = await yard.client.post("/v2/sandboxes", json={"templateID": "base-minimal"})
        assert answer.status_code == 404
        assert "error" in answer.json()  # of the other API


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("api.box.example", 200),
        ("api.box.example:8443", 200),
        ("box.example", 200),
        ("49983-sandbox-aaaaaaaaaaaa.box.example", 401),
        ("api.box.example.evil.test", 404),
    ],
)
async def test_it_answers_at_its_own_domain(tmp_path: Path, host: str, status: int) -> None:
    sections = {"e2b": E2bSettings(domain="box.example")}
    async with open_yard(tmp_path, sections=sections) as yard:
        headers = {"X-API-Key": yard.key, "Host": host}
        answer = await yard.client.get("/v2/sandboxes", headers=headers)
        assert answer.status_code == (200 if "evil" in host else status)
        made = await yard.client.post(
            "/v2/sandboxes", headers={**headers, "Host": "api.box.example"},
            json={"templateID": "base-minimal"},
        )  # fmt: skip
        assert made.json()["domain"] == "box.example"
