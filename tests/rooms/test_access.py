"""Who may do what: every route, asked by everybody who may not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from tests.support.house import Yard, eventually, open_yard, until

from sandyard.server.api.access import Scope
from sandyard.server.core.scopes import SCOPES

KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
PATIENT = {"accounts": {"failed_logins_per_minute": 100_000}}
BODIES: dict[str, dict[str, object]] = {
    "/processes": {"command": "true"},
    "/run": {"code": "1"},
    "/desktop/key": {"keys": "a"},
    "/desktop/type": {"text": "a"},
    "/desktop/click": {"x": 0, "y": 0},
    "/desktop/move": {"x": 0, "y": 0},
    "/desktop/scroll": {"x": 0, "y": 0},
    "/desktop/drag": {"fromX": 0, "fromY": 0, "toX": 1, "toY": 1},
    "/terminal/sandbox-sessions": {"sandboxId": "sandbox-aaaaaaaaaaaa"},
    "/resize": {},
    "/files/mkdir": {"path": "/a"},
    "/files/move": {"from": "/a", "to": "/b"},
    "/files/sign": {"path": "/a"},
    "/files/copy": {"from": "/a", "to": "/b"},
    "/exec": {"command": "x"},
    "/fork": {"count": 1},
    "/rollback": {"snapshotId": "x"},
    "/organizations": {"name": "Mine"},
    "/projects": {"name": "Mine"},
    "/api-keys": {"name": "Mine"},
    "/ssh-keys": {"name": "Mine", "publicKey": KEY_LINE},
    "/topup": {"amountCents": 501, "successUrl": "https://a.b", "cancelUrl": "https://a.b"},
    "/auto-topup": {"enabled": False},
    "/grants": {"amountCents": 1},
}
ENTRY: dict[str, object] = {"name": "n", "operation": "move", "target": "/", "ids": ["a"]}
"""What is asked of a workspace's files, whichever of its routes is asked."""
ADMINS = {"/v1/billing/topup", "/v1/billing/auto-topup", "/v1/billing/grants"}
ORGANIZATIONS = {"/v1/projects", "/v1/organizations", "/v1/workspaces"}
"""What belongs to the organization as a whole and is there for every member."""


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    async with open_yard(tmp_path, saves=True, sections=PATIENT) as opened:
        yield opened


def routes(yard: Yard, *, planned: bool = False) -> list[APIRoute]:
    found = []
    stack = list(yard.house.api.routes)
    while stack:
        one = stack.pop()
        if isinstance(one, APIRoute) and (planned or one.include_in_schema):
            found.append(one)
        stack += getattr(getattr(one, "original_router", None), "routes", [])
    return found


def access_of(route: APIRoute) -> Scope | None:
    scopes = [one.call for one in route.dependant.dependencies if isinstance(one.call, Scope)]
    return scopes[0] if scopes else None


class Things:
    """One of everything that an organization can have, made by its first admin."""

    def __init__(self, ids: dict[str, str]) -> None:
        self.ids = ids

    @classmethod
    async def make(cls, yard: Yard) -> "Things":
        async def post(path: str, body: dict[str, object]) -> str:
            answer = await yard.client.post(path, json=body)
            assert answer.status_code == 201, answer.text
            return str(answer.json()["data"]["id"])

        box = str((await yard.create(name="mine-alone"))["id"])
        return cls(
            {
                "/v1/sandboxes": box,
                "/v1/snapshots": await post(f"/v1/sandboxes/{box}/snapshots", {"name": "snapped"}),
                "/v1/projects": await post("/v1/projects", {"name": "secret-project"}),
                "/v1/api-keys": await post("/v1/api-keys", {"name": "secret-key"}),
                "/v1/ssh-keys": await post(
                    "/v1/ssh-keys", {"name": "secret-ssh", "publicKey": KEY_LINE}
                ),
                "/v1/workspaces": await post("/v1/workspaces", {"name": "secret-workspace"}),
                "/v1/organizations": (await yard.first())[0],
            }
        )

    def path(self, route: APIRoute) -> tuple[str, bool]:
        """Return a route's path with our things in it, and whether one is."""
        path = route.path.replace("{slug}", "base-ubuntu").replace("{process}", "1")
        for collection, thing in self.ids.items():
            if path.startswith(collection):
                for name in ("{reference}", "{project_id}", "{key_id}", "{org_id}"):
                    path = path.replace(name, thing)
        return path, path != route.path and "{slug}" not in route.path

    def told_in(self, text: str, path: str) -> list[str]:
        """Return what an answer tells of our things, beyond what was asked with."""
        words = [*self.ids.values(), "mine-alone", "secret-", "snapped"]
        return [word for word in words if word in text and word not in path]


def body_of(path: str) -> dict[str, object]:
    if path.startswith("/v1/workspaces/"):
        return ENTRY
    return next((body for end, body in BODIES.items() if path.endswith(end)), {})


async def test_every_route_declares_its_access(yard: Yard) -> None:
    found = routes(yard, planned=True)
    assert len(found) >= 60
    for route in found:
        access, is_open = access_of(route), getattr(route.endpoint, "is_open", False)
        assert (access is None) is is_open, f"{route.path} declares no access"
        assert access is None or access.name is None or access.name in SCOPES
        assert not is_open or not route.path.startswith("/v1")


async def test_every_route_refuses_a_credential_that_is_no_good(yard: Yard) -> None:
    org_id, user_id = await yard.first()
    now = datetime.now(UTC)
    things = await Things.make(yard)
    credentials = {
        "none": (None, 401, "unauthorized"),
        "garbage": ("garbage", 401, "invalid_token"),
        "jwt": ("eyJhbGciOiJub25lIn0.e30.", 401, "invalid_token"),
        "unknown": ("rt_live_" + "x" * 32, 401, "invalid_token"),
        "revoked": (await yard.add_key(org_id, user_id, revoked_at=now), 401, "invalid_token"),
        "expired": (
            await yard.add_key(org_id, user_id, expires_at=now), 401, "token_expired",
        ),
        "scopeless": (await yard.add_key(org_id, user_id, scopes=("tool:*",)), 403, "forbidden"),
    }  # fmt: skip
    for route in routes(yard):
        access = access_of(route)
        if access is None:
            continue
        path, _ = things.path(route)
        for method in route.methods or ():
            for name, (key, status, code) in credentials.items():
                if name == "scopeless" and access.name is None:
                    continue
                async with yard.client_of(key) as client:
                    answer = await client.request(method, path, json=body_of(path))
                assert answer.status_code == status, f"{name} on {method} {route.path}"
                assert answer.json()["error"]["code"] == code
                assert things.told_in(answer.text, path) == []
                if name == "scopeless":
                    assert answer.json()["error"]["details"] == {"requiredScope": access.name}


async def test_the_scope_of_a_route_opens_it_alone(yard: Yard) -> None:
    org_id, user_id = await yard.first()
    things = await Things.make(yard)
    for route in routes(yard):
        access = access_of(route)
        # A fork is a use of one sandbox, and makes another.
        if access is None or access.name is None or route.path.endswith("/fork"):
            continue
        key = await yard.add_key(org_id, user_id, scopes=(access.name,))
        path, _ = things.path(route)
        for method in route.methods or ():
            async with yard.client_of(key) as client:
                with suppress(TimeoutError):  # it tells of events, for ever
                    async with asyncio.timeout(5):
                        answer = await client.request(method, path, json=body_of(path))
            error = answer.json()["error"] if answer.is_error else {}
            # Whoever makes a key needs what it grants.
            if not str(error.get("message", "")).startswith("cannot grant"):
                assert "requiredScope" not in error.get("details", {}), (
                    f"{method} {route.path}: {error}"
                )


async def test_every_route_tells_another_organization_nothing(yard: Yard) -> None:
    things = await Things.make(yard)
    async with yard.client_of(await yard.stranger()) as stranger:
        for route in routes(yard):
            if access_of(route) is None:
                continue
            path, names_ours = things.path(route)
            for method in route.methods or ():
                carried: dict[str, Any] = {"json": body_of(path)}
                if "/upload" in path:
                    carried = {"files": {"file": ("n", b"")}}
                answer = await stranger.request(
                    method,
                    path,
                    **carried,
                    params={"all": "true", "path": "/a", "port": "80", "id": "/a"},
                )
                said = f"{method} {route.path}: {answer.status_code} {answer.text}"
                if names_ours:
                    assert answer.status_code == 404, said
                    assert answer.json()["error"]["code"] == "not_found"
                else:
                    assert answer.status_code < 500 or "payments" in answer.text, said
                assert things.told_in(answer.text, path) == [], said
        by_name = await stranger.get("/v1/sandboxes/mine-alone")
        assert by_name.status_code == 404
        # Nothing happened to ours.
    for collection, thing in things.ids.items():
        if collection != "/v1/ssh-keys":
            assert (await yard.client.get(f"{collection}/{thing}")).status_code == 200
    assert len((await yard.client.get("/v1/ssh-keys")).json()["data"]) == 1


async def test_no_route_lets_a_member_at_what_is_anothers(yard: Yard) -> None:
    org_id, _ = await yard.first()
    things = await Things.make(yard)
    key = await yard.add_key(org_id, await yard.add_member(org_id))
    async with yard.client_of(key) as member:
        for route in routes(yard):
            path, names_ours = things.path(route)
            if access_of(route) is None or path.startswith(tuple(ORGANIZATIONS)):
                continue
            for method in route.methods or ():
                answer = await member.request(
                    method,
                    path,
                    json=body_of(path),
                    params={"path": "/a", "port": "80", "id": "/a"},
                )
                said = f"{method} {route.path}: {answer.status_code} {answer.text}"
                if path in ADMINS and method != "GET":
                    assert answer.status_code == 403, said
                    assert answer.json()["error"]["details"]["requiredRole"] == "admin"
                elif names_ours:
                    assert answer.status_code == 404, said
                else:
                    assert answer.status_code < 500, said
                if not path.startswith("/v1/ssh-keys"):  # they open a member's sandboxes, too
                    told = set(things.told_in(answer.text, path)) - {org_id}
                    assert told == set(), said
        for query in ("/v1/sandboxes?all=true", "/v1/billing/my-usage?all=true"):
            scoped = await yard.add_key(
                org_id, await yard.add_member(org_id), scopes=("sandbox:read", "org:read")
            )
            async with yard.client_of(scoped) as reader:
                assert (await reader.get(query)).status_code == 403


async def test_an_orgs_id_in_the_query_must_be_ones_own(yard: Yard) -> None:
    org_id, _ = await yard.first()
    path = "/v1/billing/credits"
    assert (await yard.client.get(path, params={"orgId": org_id})).status_code == 200
    async with yard.client_of(await yard.stranger()) as stranger:
        assert (await stranger.get(path, params={"orgId": org_id})).status_code == 404


# --- how often ------------------------------------------------------------------------------------


def plans(**limits: object) -> dict[str, Any]:
    return {"plans": {"enterprise": limits}, "billing": {"enforce": False}}


async def test_requests_are_counted_told_and_refused(tmp_path: Path) -> None:
    async with open_yard(tmp_path, sections=plans(requests_per_minute=3)) as yard:
        left = []
        for _ in range(3):
            answer = await yard.client.get("/v1/me")
            assert answer.headers["x-ratelimit-limit"] == "3"
            left.append(answer.headers["x-ratelimit-remaining"])
        assert left == ["2", "1", "0"]
        refused = await yard.client.get("/v1/me")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-remaining"] == "0"
        reset = int(refused.headers["x-ratelimit-reset"])
        assert 0 < reset - datetime.now(UTC).timestamp() <= 62
        # Another key of the same user does not help; another organization is not touched.
        async with yard.client_of(await yard.add_key(*await yard.first())) as other:
            assert (await other.get("/v1/me")).status_code == 429
        async with yard.client_of(await yard.stranger()) as stranger:
            assert (await stranger.get("/v1/me")).status_code == 200


async def test_a_stranger_is_told_how_many_more_tries_there_are(tmp_path: Path) -> None:
    sections = {"accounts": {"failed_logins_per_minute": 3}}
    async with open_yard(tmp_path, sections=sections) as yard:
        async with yard.client_of(None) as nobody:
            headers = (await nobody.get("/v1/me")).headers
            assert (headers["x-ratelimit-limit"], headers["x-ratelimit-remaining"]) == ("3", "3")
        async with yard.client_of("rt_live_" + "x" * 32) as guesser:
            left = [
                (await guesser.get("/v1/me")).headers["x-ratelimit-remaining"] for _ in range(4)
            ]
        assert left == ["2", "1", "0", "0"]


async def test_every_answer_to_somebody_known_tells_what_is_left(yard: Yard) -> None:
    for path in ("/v1/me", "/v1/sandboxes/sandbox-000000000000", "/v1/sandboxes?limit=0", "/v1/x"):
        headers = (await yard.client.get(path)).headers
        assert int(headers["x-ratelimit-limit"]) == int(headers["x-ratelimit-remaining"]) > 10**6
        assert int(headers["x-ratelimit-reset"]) > datetime.now(UTC).timestamp()


async def test_failed_logins_are_limited_and_good_ones_are_not(tmp_path: Path) -> None:
    sections = {"accounts": {"failed_logins_per_minute": 3}}
    async with open_yard(tmp_path, sections=sections) as yard:
        statuses = []
        async with yard.client_of("rt_live_" + "x" * 32) as guesser:
            for _ in range(5):
                answer = await guesser.get("/v1/me")
                statuses.append(answer.status_code)
        assert statuses == [401, 401, 401, 429, 429]
        assert int(answer.headers["retry-after"]) >= 1
        assert (await yard.client.get("/v1/me")).status_code == 200


async def test_a_key_that_is_revoked_while_it_is_used_is_no_good_at_once(yard: Yard) -> None:
    made = (await yard.client.post("/v1/api-keys", json={"name": "busy"})).json()["data"]
    revoked_at = 0.0
    before: list[int] = []
    after: list[int] = []
    loop = asyncio.get_running_loop()

    async def use(client: Any) -> None:
        while True:
            started = loop.time()
            status = (await client.get("/v1/sandboxes")).status_code
            if revoked_at and started > revoked_at:
                after.append(status)
                if len(after) > 100:
                    return
            else:
                before.append(status)
            await asyncio.sleep(0.01)

    async with yard.client_of(made["key"]) as client, asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(use(client))
        await until(lambda: len(before) > 20)
        gone = await yard.client.delete(f"/v1/api-keys/{made['id']}")
        assert gone.status_code == 200
        revoked_at = loop.time()
    assert set(before[:20]) == {200}
    assert set(after) == {401}


async def test_the_last_use_of_a_key_is_told(yard: Yard) -> None:
    made = (await yard.client.post("/v1/api-keys", json={"name": "k"})).json()["data"]
    assert made["lastUsedAt"] is None
    async with yard.client_of(made["key"]) as client:
        await client.get("/v1/sandboxes")

    async def told() -> bool:
        got = (await yard.client.get(f"/v1/api-keys/{made['id']}")).json()["data"]
        return got["lastUsedAt"] is not None

    await eventually(told)
