"""Organizations, keys, projects, the feed and money, through the front door."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from tests.support.clock import AheadClock
from tests.support.house import Yard, eventually, looked, open_yard

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.money import MICROS
from sandyard.server.core.records import Membership, Role
from sandyard.server.links.local import SystemClock
from sandyard.server.service.people.organizations import set_role

HOUR_CENTS = 17
"""An hour of the default shape is 16.14 cents: 2 vCPUs, 4 GiB, and a share of a month of 10 GiB."""


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    async with open_yard(tmp_path, saves=True) as opened:
        yield opened


async def member_of(yard: Yard, *, role: Role = "member", **key: Any) -> Any:
    """Return a client of a new member."""
    org_id, _ = await yard.first()
    return yard.client_of(await yard.add_key(org_id, await yard.add_member(org_id, role), **key))


async def post(client: Any, path: str, status: int = 201, **body: object) -> Any:
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["data"] if status < 400 else answer.json()["error"]


async def get(client: Any, path: str, **query: object) -> Any:
    answer = await client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def line_of(key: Any, comment: str = "me@laptop") -> str:
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return f"{public.decode()} {comment}"


# --- me and organizations -------------------------------------------------------------------------


async def test_me_and_the_organization_are_as_the_contract_says(yard: Yard) -> None:
    me = await get(yard.client, "/v1/me")
    assert set(me) == {
        "id", "email", "firstName", "lastName", "profilePictureUrl", "isAdmin", "accessGranted",
        "tutorialCompleted",
    }  # fmt: skip
    assert (me["email"], me["isAdmin"]) == ("admin@localhost", True)
    current = await get(yard.client, "/v1/organizations/current")
    assert set(current) == {
        "id", "workosOrgId", "name", "slug", "plan", "enterprise", "role", "orgRole", "settings",
        "createdAt",
    }  # fmt: skip
    assert (current["plan"], current["role"], current["settings"]) == ("enterprise", "admin", {})
    assert await get(yard.client, f"/v1/organizations/{current['id']}") == current
    async with await member_of(yard) as member:
        theirs = await get(member, "/v1/organizations/current")
        assert (theirs["role"], theirs["orgRole"]) == ("member", "member")
        assert (await get(member, "/v1/me"))["isAdmin"] is False
        listed = await get(member, f"/v1/organizations/{current['id']}/members")
    assert (listed[0]["email"], listed[0]["role"]) == ("admin@localhost", "admin")
    assert {one["role"] for one in listed} == {"admin", "member"}
    assert set(listed[0]) == {
        "id", "userId", "email", "firstName", "lastName", "role", "status", "joinedAt",
    }  # fmt: skip


async def test_an_organization_is_founded_with_all_that_belongs_to_it(yard: Yard) -> None:
    made = await post(yard.client, "/v1/organizations", name="Acme")
    assert made["role"] == "admin"
    async with yard.house.store.read() as tx:
        project = await tx.projects.find(made["id"], None)
        (founder, member) = (await tx.users.members(made["id"]))[0]
        workspace = await tx.workspaces.personal(made["id"], founder.id)
        account = await tx.credits.account(made["id"])
    assert project is not None
    assert workspace is not None
    assert (project.id, workspace.id) == (made["defaultProjectId"], made["personalWorkspaceId"])
    assert member.role == "admin"
    # Sign-up credits are for a user's first organization only.
    assert account.balance_cents == 0
    assert (await get(yard.client, "/v1/billing/credits"))["balanceCents"] == 10_000
    # The key is for its own organization, whoever its owner is elsewhere.
    answer = await yard.client.get(f"/v1/organizations/{made['id']}")
    assert answer.status_code == 404
    for number in range(3):
        await post(yard.client, "/v1/organizations", name=f"More {number}")
    refused = await post(yard.client, "/v1/organizations", status=409, name="Too many")
    assert "organizations_per_user" in refused["message"]


async def test_the_same_request_founds_one_organization(yard: Yard) -> None:
    headers = {"Idempotency-Key": "k"}
    answers = await asyncio.gather(
        *(
            yard.client.post("/v1/organizations", json={"name": "Acme"}, headers=headers)
            for _ in range(5)
        )
    )
    assert len({one.json()["data"]["id"] for one in answers}) == 1


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 101, "\x00"])
async def test_names_that_cannot_be_are_refused(yard: Yard, name: str) -> None:
    for path in ("/v1/organizations", "/v1/projects", "/v1/api-keys"):
        refused = await post(yard.client, path, status=400, name=name)
        assert refused["details"]["field"] == "name"


# --- projects -------------------------------------------------------------------------------------


async def test_projects_are_made_changed_and_deleted(yard: Yard) -> None:
    (default,) = await get(yard.client, "/v1/projects")
    assert (default["isDefault"], default["slug"]) == (True, "default")
    made = await post(yard.client, "/v1/projects", name="Crawler", color="#3b82f6")
    assert set(made) == {"id", "name", "slug", "color", "isDefault", "createdAt"}
    assert made["slug"].startswith("crawler-")
    path = f"/v1/projects/{made['id']}"
    changed = await yard.client.patch(path, json={"name": "Spider"})
    assert changed.json()["data"] == {**made, "name": "Spider"}
    box = await yard.create(projectId=made["id"])
    listed = await get(yard.client, "/v1/sandboxes", project_id=made["id"])
    assert [one["id"] for one in listed] == [box["id"]]
    assert (await yard.client.delete(path)).json()["data"]["deleted"] is True
    assert (await yard.client.get(path)).status_code == 404
    # What was in it is in the default project; that one stays.
    assert (await yard.get(box))["projectId"] == default["id"]
    refused = await yard.client.delete(f"/v1/projects/{default['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "invalid_state")
    taken = await post(yard.client, "/v1/projects", name="A", slug="same")
    assert taken["slug"] == "same"
    assert (await post(yard.client, "/v1/projects", status=409, name="B", slug="same"))[
        "code"
    ] == "conflict"
    for body in ({"color": "red"}, {"slug": "Not A Slug"}):
        (field,) = body
        assert (await post(yard.client, "/v1/projects", status=400, name="C", **body))["details"][
            "field"
        ] == field


# --- API keys -------------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_listed_without_its_secret(yard: Yard) -> None:
    answer = await yard.client.post("/v1/api-keys", json={"name": "ci", "expiresIn": "30d"})
    body = answer.json()
    secret = body["data"].pop("key")
    assert "not be able to see it again" in body["message"]
    assert secret.startswith("rt_live_")
    assert len(secret) == len("rt_live_") + 32
    made = body["data"]
    assert made["scopes"] == ["*"]
    assert made["status"] == "active"
    assert secret.startswith(made["keyPrefix"])
    ends = datetime.fromisoformat(made["expiresAt"]) - datetime.now(UTC)
    assert timedelta(days=29) < ends < timedelta(days=31)
    listed = await yard.client.get("/v1/api-keys")
    assert made["id"] in listed.text
    one = await yard.client.get(f"/v1/api-keys/{made['id']}")
    assert one.json()["data"] == made
    assert secret not in listed.text + one.text
    async with yard.client_of(secret) as client:
        assert (await client.get("/v1/me")).status_code == 200
    written = await yard.written()
    assert made["keyPrefix"].encode() in written
    assert secret.encode() not in written


async def test_a_rotated_key_has_a_new_secret_and_the_old_is_no_good(yard: Yard) -> None:
    made = await post(yard.client, "/v1/api-keys", name="k", scopes=["sandbox:read"])
    again = await post(yard.client, f"/v1/api-keys/{made['id']}/rotate", status=200)
    assert again["id"] == made["id"]
    assert again["key"] != made["key"]
    async with yard.client_of(made["key"]) as old, yard.client_of(again["key"]) as new:
        assert (await old.get("/v1/sandboxes")).json()["error"]["code"] == "invalid_token"
        assert (await new.get("/v1/sandboxes")).status_code == 200
    gone = await yard.client.delete(f"/v1/api-keys/{made['id']}")
    assert gone.json()["data"]["status"] == "revoked"
    assert (await yard.client.delete(f"/v1/api-keys/{made['id']}")).status_code == 200
    assert (await yard.client.post(f"/v1/api-keys/{made['id']}/rotate")).status_code == 409
    assert made["id"] not in (await yard.client.get("/v1/api-keys")).text


async def test_a_key_grants_nothing_that_its_creator_lacks(yard: Yard) -> None:
    scopes = ("org:write", "org:read", "sandbox:read")
    async with await member_of(yard, scopes=scopes) as member:
        refused = await post(member, "/v1/api-keys", status=403, name="more")
        assert refused["details"]["requiredScope"] == "*"
        refused = await post(
            member, "/v1/api-keys", status=403, name="more", scopes=["sandbox:write"]
        )
        assert refused["details"]["requiredScope"] == "sandbox:write"
        made = await post(member, "/v1/api-keys", name="less", scopes=["sandbox:read"])
        path = f"/v1/api-keys/{made['id']}"
        assert (await member.patch(path, json={"scopes": ["*"]})).status_code == 403
        assert (await member.patch(path, json={"name": "renamed"})).json()["data"][
            "name"
        ] == "renamed"
    # Everything is not what only admins grant.
    async with await member_of(yard) as member:
        refused = await post(
            member, "/v1/api-keys", status=403, name="more", scopes=["admin:resources"]
        )
        assert refused["details"]["requiredScope"] == "admin:resources"
    # A key of an admin's that may do more than a member's is not rotated by the member.
    made = await post(yard.client, "/v1/api-keys", name="all", scopes=["admin:resources", "*"])
    async with await member_of(yard) as member:
        assert (await member.post(f"/v1/api-keys/{made['id']}/rotate")).status_code == 404
    # Nor does a key that ends make one that does not.
    until = datetime.now(UTC) + timedelta(hours=1)
    ending = await yard.add_key(*await yard.first(), expires_at=until)
    async with yard.client_of(ending) as client:
        made = await post(client, "/v1/api-keys", name="for ever")
        assert datetime.fromisoformat(made["expiresAt"]) <= until


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scopes": ["sandbox"]}, "scopes"),
        ({"expiresIn": "1h"}, "expiresIn"),
        ({"expiresIn": "0d"}, "expiresIn"),
        ({"expiresIn": "9999y"}, "expiresIn"),
        ({"projectId": "6ad0b1a5-0000-4000-8000-000000000000"}, "projectId"),
        ({"projectId": "x"}, "projectId"),
        ({"scopes": "*"}, "scopes"),
    ],
)
async def test_what_cannot_be_in_a_key_is_refused(
    yard: Yard, body: dict[str, object], field: str
) -> None:
    refused = await post(yard.client, "/v1/api-keys", status=400, name="k", **body)
    assert refused["details"]["field"] == field


async def test_a_key_ends_when_it_says(yard: Yard) -> None:
    made = await post(yard.client, "/v1/api-keys", name="k", expiresIn="1d")
    async with yard.house.store.write(Turn.ALONE) as tx:
        org_id, _ = await yard.first()
        key = await tx.keys.find(org_id, made["id"])
        assert key is not None
        await tx.keys.replace(replace(key, expires_at=datetime.now(UTC)))
    async with yard.client_of(made["key"]) as client:
        assert (await client.get("/v1/me")).json()["error"]["code"] == "token_expired"
    assert (await get(yard.client, f"/v1/api-keys/{made['id']}"))["status"] == "expired"


async def test_a_member_who_was_an_admin_has_no_admins_keys(yard: Yard) -> None:
    org_id, _ = await yard.first()
    user_id = await yard.add_member(org_id, "admin")
    strong = await yard.add_key(org_id, user_id, scopes=("*", "admin:resources"))
    plain = await yard.add_key(org_id, user_id)
    box = await yard.create()
    async with yard.client_of(plain) as client, yard.client_of(strong) as admin:
        path = f"/v1/sandboxes/{box['id']}"
        assert (await client.get(path)).status_code == 200
        async with yard.house.store.write(Turn.ALONE) as tx:
            member = await tx.users.member(org_id, user_id)
            assert isinstance(member, Membership)
            await set_role(tx, member, "member", actor=None, at=SystemClock().now())
        assert (await client.get(path)).status_code == 404
        assert (await admin.get(path)).status_code == 401


async def test_test_keys_make_free_sandboxes_a_few_at_once(yard: Yard) -> None:
    made = await post(yard.client, "/v1/api-keys", name="t", isTest=True)
    assert made["key"].startswith("rt_test_")
    async with yard.client_of(made["key"]) as client:
        boxes = [await post(client, "/v1/sandboxes") for _ in range(2)]
        refused = await post(client, "/v1/sandboxes", status=409)
        assert (refused["code"], refused["details"]["limit"]) == ("conflict", "testSandboxes")
        cost = await get(client, f"/v1/sandboxes/{boxes[0]['id']}/cost")
        assert (cost["isFree"], cost["totalMicros"], cost["hourlyMicros"]) == (True, 0, 0)
        # Its keys are test keys, whatever they ask for.
        more = await post(client, "/v1/api-keys", name="u")
        assert more["key"].startswith("rt_test_")
        await client.delete(f"/v1/sandboxes/{boxes[0]['id']}")
        await post(client, "/v1/sandboxes")


# --- SSH keys -------------------------------------------------------------------------------------


async def test_ssh_keys_are_added_listed_used_and_deleted(yard: Yard) -> None:
    line = line_of(ed25519.Ed25519PrivateKey.generate())
    made = await post(yard.client, "/v1/ssh-keys", name="laptop", publicKey=line)
    assert set(made) == {
        "id", "name", "fingerprint", "keyType", "createdAt", "lastUsedAt", "key_type",
        "created_at", "last_used_at",
    }  # fmt: skip
    assert made["fingerprint"].startswith("SHA256:")
    assert (made["keyType"], made["key_type"]) == ("ssh-ed25519", "ssh-ed25519")
    # Under another name and comment it is the same key.
    again = line.rsplit(" ", 1)[0]
    refused = await post(yard.client, "/v1/ssh-keys", status=409, name="b", public_key=again)
    assert refused["code"] == "conflict"
    other = line_of(ec.generate_private_key(ec.SECP384R1()))
    second = await post(yard.client, "/v1/ssh-keys", name="second", public_key=other)
    listed = await yard.client.get("/v1/ssh-keys")
    assert [one["id"] for one in listed.json()["data"]] == [second["id"], made["id"]]
    assert "AAAA" not in listed.text
    for wanted, count in ((None, 2), ([made["id"]], 1), ([made["id"], other], 2), ([], 0)):
        body = {} if wanted is None else {"sshKeys": wanted}
        box = await yard.create(**body)
        async with yard.house.store.read() as tx:
            stored = await tx.sandboxes.find(str(box["id"]))
        assert stored is not None
        assert len(stored.authorized_keys) == count
        assert box["sshAuthMethod"] == ("key" if count else "none")
    refused = await post(yard.client, "/v1/sandboxes", status=400, sshKeys=["nobody"])
    assert refused["details"]["field"] == "sshKeys"
    async with await member_of(yard) as member:
        assert (await member.delete(f"/v1/ssh-keys/{made['id']}")).status_code == 404
    gone = await yard.client.delete(f"/v1/ssh-keys/{made['id']}")
    assert gone.json()["data"] == {"success": True}
    assert (await yard.client.delete(f"/v1/ssh-keys/{made['id']}")).status_code == 404


def blob(*parts: bytes) -> str:
    return base64.b64encode(b"".join(len(one).to_bytes(4, "big") + one for one in parts)).decode()


POINT = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
ON_CURVE = b"\x04" + POINT.x.to_bytes(32, "big") + POINT.y.to_bytes(32, "big")
OFF_CURVE = ON_CURVE[:-1] + bytes([ON_CURVE[-1] ^ 1])
SK = "sk-ecdsa-sha2-nistp256@openssh.com"


@pytest.mark.parametrize(
    ("line", "is_good"),
    [
        (line_of(rsa.generate_private_key(65537, 1024)), False),
        (line_of(rsa.generate_private_key(65537, 2048)), True),
        (f"ssh-ed25519 {blob(b'ssh-ed25519', b'x' * 31)}", False),
        (f"ssh-ed25519 {blob(b'ssh-ed25519', b'x' * 32, b'y')}", False),
        (f"ssh-ed25519 {blob(b'ssh-rsa', b'x' * 32)}", False),
        (f"{SK} {blob(SK.encode(), b'nistp256', ON_CURVE, b'ssh:')}", True),
        (f"{SK} {blob(SK.encode(), b'nistp256', ON_CURVE)}", False),
        (f"{SK} {blob(SK.encode(), b'nistp256', OFF_CURVE, b'ssh:')}", False),
        (f"{SK} {blob(SK.encode(), b'nistp384', ON_CURVE, b'ssh:')}", False),
        (f"ssh-rsa {blob(b'ssh-rsa', b'', b'')}", False),
        (f"ssh-rsa {blob(b'ssh-rsa')}", False),
        ("ssh-ed25519 !!!", False),
        ("ssh-dss AAAAB3NzaC1kc3M=", False),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", False),
        ('command="rm" ssh-ed25519 AAAA', False),
        ("", False),
    ],
)
async def test_only_sound_public_keys_are_taken(yard: Yard, line: str, is_good: bool) -> None:
    answer = await yard.client.post("/v1/ssh-keys", json={"name": "k", "publicKey": line})
    assert answer.status_code == (201 if is_good else 400), answer.text
    if not is_good:
        assert answer.json()["error"]["details"]["field"] == "publicKey"


# --- the feed -------------------------------------------------------------------------------------


async def test_the_feed_tells_what_happened_and_to_whom(yard: Yard) -> None:
    box = await yard.create()
    await yard.execute(box, "hello")
    key = await post(yard.client, "/v1/api-keys", name="k")
    events = (await get(yard.client, "/v1/activity"))["events"]
    assert [one["eventType"] for one in events[:4]] == [
        "api_key.created", "sandbox.exec", "sandbox.running", "sandbox.created",
    ]  # fmt: skip
    assert set(events[0]) == {
        "id", "orgId", "actorUserId", "actorType", "resourceType", "resourceId", "eventType",
        "severity", "status", "title", "summary", "attributes", "sandboxId", "workspaceId",
        "createdAt", "threadId", "agentRunId", "toolSlug", "installableAgentInstallId",
        "runmeshNodeId", "codeExecutionId",
    }  # fmt: skip
    assert (events[0]["resourceId"], events[0]["actorType"]) == (key["id"], "api_key")
    assert key["key"] not in json.dumps(events)

    async def types(**query: object) -> list[str]:
        found = (await get(yard.client, "/v1/activity", **query))["events"]
        return [one["eventType"] for one in found]

    assert await types(sandbox_id=box["id"]) == [
        "sandbox.exec", "sandbox.running", "sandbox.created",
    ]  # fmt: skip
    assert await types(event_type="sandbox.exec") == ["sandbox.exec"]
    assert await types(resource_type="api_key", resource_id=key["id"]) == ["api_key.created"]
    assert await types(severity="error") == []
    assert await types(workspace_id="w") == []
    assert await types(workspace_id="w", resource_type="sandbox") == []
    assert await types(actor_user_id=(await yard.first())[1], status="running") == ["sandbox.exec"]
    now = datetime.now(UTC).isoformat()
    assert await types(since=now) == []
    assert len(await types(until=now)) == len(events)
    page = (await yard.client.get("/v1/activity", params={"limit": 2})).json()
    assert page["hasMore"] is True
    rest = await types(limit=500, cursor=page["nextCursor"])
    assert len(rest) == len(events) - 2
    for query in ({"since": "yesterday"}, {"until": "2026-01-01"}, {"limit": 501}):
        assert (await yard.client.get("/v1/activity", params=query)).status_code == 400
    # The history of one that is gone is kept.
    await yard.client.delete(f"/v1/sandboxes/{box['id']}")
    assert "sandbox.destroyed" in await types(sandbox_id=box["id"])


async def test_a_member_reads_what_is_theirs_in_the_feed(yard: Yard) -> None:
    admins = await yard.create()
    async with await member_of(yard) as member:
        own = await post(member, "/v1/sandboxes")
        events = (await get(member, "/v1/activity"))["events"]
        assert {one["sandboxId"] for one in events} == {own["id"]}
        answer = await member.get(f"/v1/sandboxes/{admins['id']}/activity")
        assert answer.status_code == 404
        found = (await get(member, f"/v1/sandboxes/{own['id']}/activity"))["events"]
        assert [one["eventType"] for one in found][-1] == "sandbox.created"


# --- plans ----------------------------------------------------------------------------------------


def limited(**limits: object) -> dict[str, Any]:
    return {"plans": {"enterprise": limits}}


@pytest.mark.parametrize(
    ("limits", "resources", "field"),
    [
        ({"vcpus": 1}, {}, "resources.vcpus"),
        ({"memory_gb": 3}, {}, "resources.memory"),
        ({"disk_gb": 9}, {}, "resources.disk"),
    ],
)
async def test_a_shape_beyond_the_plan_is_refused_with_its_limit(
    tmp_path: Path, limits: dict[str, object], resources: dict[str, object], field: str
) -> None:
    async with open_yard(tmp_path, sections=limited(**limits)) as yard:
        refused = await post(yard.client, "/v1/sandboxes", status=400, resources=resources)
        assert refused["details"]["field"] == field
        assert "plan allows" in refused["message"]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"sandboxes": 2}, "sandboxes"),
        ({"vcpus": 5}, "vcpus"),
        ({"memory_gb": 10}, "memoryGb"),
        ({"disk_gb": 25}, "diskGb"),
    ],
)
async def test_what_runs_is_bounded_by_the_plan(
    tmp_path: Path, limits: dict[str, object], name: str
) -> None:
    async with open_yard(tmp_path, saves=True, sections=limited(**limits)) as yard:
        boxes = [await yard.create() for _ in range(2)]
        refused = await post(yard.client, "/v1/sandboxes", status=409)
        assert (refused["code"], refused["details"]["limit"]) == ("conflict", name)
        fork = await post(yard.client, f"/v1/sandboxes/{boxes[0]['id']}/fork", status=409)
        assert fork["details"]["limit"] == name
        assert (await get(yard.client, "/v1/snapshots")) == []
        await yard.act(boxes[0], "pause")
        if name == "diskGb":
            await post(yard.client, "/v1/sandboxes", status=409)
            await yard.client.delete(f"/v1/sandboxes/{boxes[0]['id']}")
            await yard.create()
        else:
            # What is paused takes nothing of it, and comes back only if there is room.
            await yard.create()
            refused = await post(yard.client, f"/v1/sandboxes/{boxes[0]['id']}/resume", status=409)
            assert refused["details"]["limit"] == name
            assert (await yard.get(boxes[0]))["status"] == "paused"


async def test_snapshots_are_bounded_by_the_plan_in_number_and_size(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True, sections=limited(snapshots=2)) as yard:
        path = f"/v1/sandboxes/{(await yard.create())['id']}/snapshots"
        answers = await asyncio.gather(*(yard.client.post(path) for _ in range(10)))
        statuses = [one.status_code for one in answers]
        assert (statuses.count(201), statuses.count(409)) == (2, 8)
        refused = await post(yard.client, path, status=409)
        assert (refused["code"], refused["details"]["limit"]) == ("conflict", "snapshots")
        (first, _) = await get(yard.client, "/v1/snapshots")
        await yard.client.delete(f"/v1/snapshots/{first['id']}")
        await post(yard.client, path)
    (tmp_path / "size").mkdir()
    async with open_yard(tmp_path / "size", saves=True, sections=limited(snapshot_gb=0)) as yard:
        path = f"/v1/sandboxes/{(await yard.create())['id']}/snapshots"
        refused = await post(yard.client, path, status=409)
        assert refused["details"]["limit"] == "snapshotGb"
        assert await get(yard.client, "/v1/snapshots") == []


async def test_a_snapshot_that_turns_out_too_large_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_yard(tmp_path, saves=True, sections=limited(snapshot_gb=1)) as yard:
        box = await yard.create()
        monkeypatch.setattr(
            "sandyard.server.service.sandboxes.snapshots.believed_bytes", lambda *_: 2**30 + 1
        )
        refused = await post(yard.client, f"/v1/sandboxes/{box['id']}/snapshots", status=409)
        assert refused["details"]["limit"] == "snapshotGb"
        assert await get(yard.client, "/v1/snapshots") == []
        await eventually(lambda: has_no(tmp_path / "snapshots"))


async def has_no(folder: Path) -> bool:
    return not folder.is_dir() or not any(folder.iterdir())


async def test_snapshots_of_test_keys_are_free_and_few(yard: Yard) -> None:
    made = await post(yard.client, "/v1/api-keys", name="t", isTest=True)
    async with yard.client_of(made["key"]) as client:
        box = (await client.post("/v1/sandboxes", params={"wait": 20}, json={})).json()["data"]
        path = f"/v1/sandboxes/{box['id']}/snapshots"
        for _ in range(2):
            await post(client, path)
        refused = await post(client, path, status=409)
        assert refused["details"]["limit"] == "testSnapshots"
    # Another key's sandbox is not bound by that.
    own = await yard.create()
    await post(yard.client, f"/v1/sandboxes/{own['id']}/snapshots")


async def test_twenty_creates_at_once_do_not_pass_a_limit(tmp_path: Path) -> None:
    async with open_yard(tmp_path, sections=limited(sandboxes=3)) as yard:
        answers = await asyncio.gather(
            *(yard.client.post("/v1/sandboxes", json={}) for _ in range(20))
        )
        statuses = [one.status_code for one in answers]
        assert (statuses.count(201), statuses.count(409)) == (3, 17)


# --- credits --------------------------------------------------------------------------------------


def funded(cents: int, **billing: object) -> dict[str, Any]:
    return {"billing": {"sign_up_cents": cents, **billing}}


async def test_a_snapshot_needs_credits_and_its_storage_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sandyard.server.service.sandboxes.snapshots.believed_bytes", lambda *_: 2**30
    )
    clock, sections = AheadClock(), funded(2 * HOUR_CENTS)
    async with open_yard(tmp_path, saves=True, clock=clock, sections=sections) as yard:
        box = await yard.create(idleTimeout=0)
        path = f"/v1/sandboxes/{box['id']}/snapshots"
        await post(yard.client, path)
        await yard.act(box, "pause")
        org_id, _ = await yard.first()

        async def balance() -> int:
            await yard.house.meter.charge(org_id)
            return int((await get(yard.client, "/v1/billing/credits"))["balanceCents"])

        before = await balance()
        clock.ahead = timedelta(days=365)
        # Nothing runs, and a GiB that is kept costs 10 cents a month all the same.
        assert before - await balance() >= 119
        refused = await post(yard.client, path, status=402)
        assert refused["code"] == "insufficient_credits"
        assert "snapshot" in refused["message"]
        assert len(await get(yard.client, "/v1/snapshots")) == 1


async def test_what_cannot_be_paid_for_an_hour_is_refused(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True, sections=funded(2 * HOUR_CENTS)) as yard:
        box = await yard.create()
        await yard.create()
        refused = await post(yard.client, "/v1/sandboxes", status=402)
        assert refused["code"] == "insufficient_credits"
        assert refused["details"] == {
            "priceCents": 17, "runningCents": 33, "balanceCents": 34,
        }  # fmt: skip
        for word in ("0.17", "0.33", "0.34", "/v1/billing/topup", "sandyard admin grant"):
            assert word in refused["message"]
        await post(yard.client, f"/v1/sandboxes/{box['id']}/fork", status=402)
        await yard.act(box, "pause")
        await yard.create()
        for action in ("resume", "exec"):
            refused = await post(
                yard.client, f"/v1/sandboxes/{box['id']}/{action}", status=402, command="x"
            )
            assert refused["code"] == "insufficient_credits"
        assert (await yard.get(box))["status"] == "paused"
        org_id, _ = await yard.first()
        granted = await post(
            yard.client, "/v1/billing/grants", amountCents=100, referenceId="r", orgId=org_id
        )
        assert granted["balanceAfterCents"] == 134
        assert await yard.execute(box, "recall") == ""


async def test_the_check_can_be_switched_off(tmp_path: Path) -> None:
    async with open_yard(tmp_path, sections=funded(0, enforce=False)) as yard:
        box = await yard.create()
        cost = await get(yard.client, f"/v1/sandboxes/{box['id']}/cost")
        assert cost["hourlyMicros"] == 16_136_986
        assert (await get(yard.client, "/v1/billing/credits"))["balanceCents"] == 0


async def test_a_grant_is_given_once_by_operators_only(yard: Yard) -> None:
    async with await member_of(yard, role="admin") as admin:
        refused = await post(admin, "/v1/billing/grants", status=403, amountCents=5)
        assert refused["details"]["requiredRole"] == "operator"
    body: Any = {"amountCents": 500, "referenceId": "invoice 7", "description": "Thanks"}
    entries = await asyncio.gather(
        *(post(yard.client, "/v1/billing/grants", **body) for _ in range(10))
    )
    assert len({one["id"] for one in entries}) == 1
    assert (await get(yard.client, "/v1/billing/credits")) == {
        "balanceCents": 10_500, "totalGrantedCents": 10_500, "totalUsedCents": 0,
        "freeCreditsUsed": False,
    }  # fmt: skip
    refused = await post(
        yard.client, "/v1/billing/grants", status=400, amountCents=6, referenceId="invoice 7"
    )
    assert refused["details"]["field"] == "referenceId"
    for cents in (0, -1, 10**13):
        await post(yard.client, "/v1/billing/grants", status=400, amountCents=cents)
    unknown = "6ad0b1a5-0000-4000-8000-000000000000"
    await post(yard.client, "/v1/billing/grants", status=404, amountCents=1, orgId=unknown)
    history = await get(yard.client, "/v1/billing/credits/history", limit=1)
    assert [one["description"] for one in history] == ["Thanks"]
    assert set(history[0]) == {
        "id", "orgId", "type", "amountCents", "resource", "description", "referenceId",
        "balanceAfterCents", "createdAt",
    }  # fmt: skip
    plan = await get(yard.client, "/v1/billing/plan")
    assert (plan["plan"], plan["limits"]["sandboxes"]) == ("enterprise", None)


async def test_an_account_that_runs_dry_pauses_what_runs(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(
        tmp_path, saves=True, clock=clock, sections=funded(2 * HOUR_CENTS)
    ) as yard:
        box = await yard.create(idleTimeout=0)
        await yard.execute(box, "remember the milk")
        test_key = await post(yard.client, "/v1/api-keys", name="t", isTest=True)
        async with yard.client_of(test_key["key"]) as client:
            free = await post(client, "/v1/sandboxes?wait=20", idleTimeout=0)
        clock.ahead = timedelta(hours=3)
        await yard.house.meter.charge_all()

        async def paused() -> bool:
            return (await yard.get(box))["status"] == "paused"

        await eventually(paused)
        got = await yard.get(box)
        assert got["statusReason"]["code"] == "insufficient_credits"  # type: ignore[index]
        assert (await yard.get(free))["status"] == "running"
        assert (await get(yard.client, "/v1/billing/credits"))["balanceCents"] < 0
        events = (await get(yard.client, "/v1/activity", event_type="billing.exhausted"))["events"]
        assert len(events) == 1
        refused = await post(yard.client, f"/v1/sandboxes/{box['id']}/resume", status=402)
        assert refused["code"] == "insufficient_credits"
        await post(yard.client, "/v1/billing/grants", amountCents=1000)
        assert (await yard.act(box, "resume"))["status"] == "running"
        assert await yard.execute(box, "recall") == "the milk"


async def test_what_was_used_is_told_to_the_member_and_the_admin(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:
        box = await yard.create(idleTimeout=0)
        snapshot = await yard.act(box, "snapshots", name="s")
        async with await member_of(yard) as member:
            own = await post(member, "/v1/sandboxes?wait=20", idleTimeout=0)
            clock.ahead = timedelta(hours=1)
            mine = await get(member, "/v1/billing/my-usage", period="all_time")
            assert [one["sandboxId"] for one in mine["sandboxes"]] == [own["id"]]
            assert 3600 <= mine["sandboxRuntime"]["seconds"] < 3660
            assert mine["storageUsage"]["byteSeconds"] == 0
        every = await get(yard.client, "/v1/billing/my-usage", period="30d", all=True)
        assert {one["sandboxId"] for one in every["sandboxes"]} == {own["id"], box["id"]}
        assert every["sandboxRuntime"]["costCents"] == 32
        assert every["storageUsage"]["byKind"].keys() == {"snapshot"}
        assert every["storageUsage"]["byKind"]["snapshot"] >= 3600 * snapshot["sizeBytes"] * 0.9
        cost = await get(yard.client, f"/v1/sandboxes/{box['id']}/cost")
        assert 16 * MICROS <= cost["totalMicros"] < 18 * MICROS
        await yard.act(box, "pause")
        clock.ahead = timedelta(hours=2)
        later = await get(yard.client, f"/v1/sandboxes/{box['id']}/cost")
        # What is paused costs what it keeps on disk, and no more than that.
        assert later["runtime"]["costMicros"] <= cost["runtime"]["costMicros"] + MICROS // 10
        assert later["storage"]["byKind"]["sandbox"] > 0
        week = await get(yard.client, "/v1/billing/my-usage", period="7d")
        assert week["period"] == "7d"
        assert (await yard.client.get("/v1/billing/my-usage?period=year")).status_code == 400


async def test_a_dead_machine_is_charged_until_it_was_last_seen(tmp_path: Path) -> None:
    """The server and its machines are killed; what comes back hours later charges no hour."""
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:
        box = await yard.create(idleTimeout=0)
        await yard.house.meter.charge_all()
    clock.ahead = timedelta(hours=9)
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:

        async def lost() -> bool:
            return (await yard.get(box))["status"] == "error"

        await eventually(lost)
        async with yard.house.store.read() as tx:
            (period,) = await tx.usage.of_sandbox(str(box["id"]))
        assert period.ended_at is not None
        assert period.ended_at - period.started_at < timedelta(minutes=1)


async def test_topping_up_says_what_is_not_set_up(yard: Yard) -> None:
    body: Any = {"amountCents": 501, "successUrl": "https://a.b/ok", "cancelUrl": "https://a.b/no"}
    refused = await post(yard.client, "/v1/billing/topup", status=503, **body)
    assert "billing.stripe_secret" in refused["message"]
    for change, field in (
        ({"amountCents": 500}, "amountCents"),
        ({"successUrl": "javascript:alert(1)"}, "successUrl"),
    ):
        refused = await post(yard.client, "/v1/billing/topup", status=400, **{**body, **change})
        assert refused["details"]["field"] == field
    first = await get(yard.client, "/v1/billing/auto-topup")
    assert first == {
        "enabled": False, "thresholdCents": 1000, "topupAmountCents": 2000,
        "hasSavedPaymentMethod": False, "lastTopupAt": None,
    }  # fmt: skip
    answer = await yard.client.put(
        "/v1/billing/auto-topup", json={"enabled": True, "thresholdCents": 5}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    assert "no card" in answer.json()["error"]["message"]
    answer = await yard.client.put(
        "/v1/billing/auto-topup", json={"enabled": False, "thresholdCents": 5}
    )
    assert answer.json()["data"] == {**first, "thresholdCents": 5}
    for wrong in ({"enabled": True, "thresholdCents": 0}, {"enabled": 1}):
        assert (await yard.client.put("/v1/billing/auto-topup", json=wrong)).status_code == 400
    webhook = await yard.client.post("/webhooks/stripe", content=b"{}")
    assert webhook.status_code == 503


# --- who may act as whom --------------------------------------------------------------------------


async def test_a_key_is_rotated_by_its_owner_only(yard: Yard) -> None:
    """Its secret would let another act as its owner."""
    operators = await post(yard.client, "/v1/api-keys", name="operator's")
    async with await member_of(yard, role="admin") as admin:
        refused = await post(admin, f"/v1/api-keys/{operators['id']}/rotate", status=403)
        assert "act as them" in refused["message"]
        assert (await admin.delete(f"/v1/api-keys/{operators['id']}")).status_code == 200


async def test_a_key_does_not_grow_by_way_of_another(yard: Yard) -> None:
    live = await post(yard.client, "/v1/api-keys", name="live")
    test = await post(yard.client, "/v1/api-keys", name="test", isTest=True)
    ending = await post(yard.client, "/v1/api-keys", name="ending", expiresIn="1d")
    path = f"/v1/api-keys/{live['id']}"
    async with yard.client_of(test["key"]) as client:
        assert (await client.post(f"{path}/rotate")).status_code == 403
        assert (await client.patch(path, json={"name": "mine"})).status_code == 403
        assert (await client.delete(path)).status_code == 403
    async with yard.client_of(ending["key"]) as client:
        rotated = await post(client, f"{path}/rotate", status=200)
    assert rotated["expiresAt"] == ending["expiresAt"]
    refused = await yard.client.patch(path, json={"scopes": []})
    assert refused.json()["error"]["details"]["field"] == "scopes"


async def test_who_is_demoted_while_asking_grants_nothing_of_an_admins(yard: Yard) -> None:
    org_id, _ = await yard.first()
    user_id = await yard.add_member(org_id, "admin")
    async with yard.client_of(await yard.add_key(org_id, user_id)) as client:
        async with yard.house.store.write(Turn.ALONE) as tx:
            asking = asyncio.create_task(
                client.post("/v1/api-keys", json={"name": "k", "scopes": ["*", "admin:*"]})
            )
            await asyncio.sleep(0.2)  # it waits for this very transaction
            member = await tx.users.member(org_id, user_id)
            assert member is not None
            await set_role(tx, member, "member", actor=None, at=SystemClock().now())
        assert (await asking).status_code == 403


async def test_deleting_a_project_breaks_nothing_that_goes_on_in_it(yard: Yard) -> None:
    for _ in range(3):
        project = await post(yard.client, "/v1/projects", name="P")
        box = await yard.create(projectId=project["id"])
        path = f"/v1/sandboxes/{box['id']}"
        answers = await asyncio.gather(
            *(yard.client.patch(path, json={"tags": [str(number)]}) for number in range(6)),
            yard.client.delete(f"/v1/projects/{project['id']}"),
            yard.client.post("/v1/sandboxes", json={"projectId": project["id"]}),
        )
        assert {one.status_code for one in answers} <= {200, 201, 400}
        (default, *_) = await get(yard.client, "/v1/projects")
        assert (await yard.get(box))["projectId"] == default["id"]


# --- money on bad days ----------------------------------------------------------------------------


async def test_a_burst_does_not_pass_on_the_credits_of_one(tmp_path: Path) -> None:
    async with open_yard(tmp_path, sections=funded(2 * HOUR_CENTS)) as yard:
        yard.conduct.start_delay_s = 0.3
        answers = await asyncio.gather(
            *(yard.client.post("/v1/sandboxes", json={}) for _ in range(20))
        )
        statuses = [one.status_code for one in answers]
        assert (statuses.count(201), statuses.count(402)) == (2, 18)


async def test_a_rollback_that_cannot_be_paid_leaves_the_sandbox_running(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(
        tmp_path, saves=True, clock=clock, sections=funded(2 * HOUR_CENTS)
    ) as yard:
        box = await yard.create(idleTimeout=0)
        snapshot = await yard.act(box, "snapshots", name="s")
        clock.ahead = timedelta(minutes=90)
        path = f"/v1/sandboxes/{box['id']}/rollback"
        await post(yard.client, path, status=402, snapshotId=snapshot["id"])
        assert (await yard.get(box))["status"] == "running"


async def test_whoever_comes_second_to_a_resume_joins_it(tmp_path: Path) -> None:
    async with open_yard(tmp_path, saves=True, sections=limited(sandboxes=1)) as yard:
        box = await yard.create()
        await yard.act(box, "pause")
        said = await asyncio.gather(*(yard.execute(box, f"n{n}") for n in range(20)))
        assert len(said) == 20


async def test_a_snapshot_is_not_deleted_while_it_is_made(yard: Yard) -> None:
    """What is charged for would go on without it."""
    box = await yard.create()
    yard.conduct.save_delay_s = 0.5
    making = asyncio.create_task(
        yard.client.post(f"/v1/sandboxes/{box['id']}/snapshots", json={"name": "s"})
    )

    async def is_being_made() -> bool:
        answer = await yard.client.delete("/v1/snapshots/s")
        assert answer.status_code in (404, 409)
        return answer.status_code == 409

    await eventually(is_being_made)
    assert (await making).status_code == 201
    assert (await yard.client.delete("/v1/snapshots/s")).status_code == 200
    await yard.house.meter.charge((await yard.first())[0])
    async with yard.house.store.read() as tx:
        assert await tx.storage.unsettled((await yard.first())[0]) == []


async def test_a_test_keys_snapshot_of_what_is_paid_for_is_paid_for(yard: Yard) -> None:
    box = await yard.create()
    test = await post(yard.client, "/v1/api-keys", name="t", isTest=True)
    async with yard.client_of(test["key"]) as client:
        await post(client, f"/v1/sandboxes/{box['id']}/snapshots", name="s")
    async with yard.house.store.read() as tx:
        (period,) = await tx.storage.unsettled((await yard.first())[0])
    assert not period.is_free


async def test_a_pause_that_fails_is_not_tried_and_told_again_at_once(tmp_path: Path) -> None:
    clock = AheadClock()
    async with open_yard(
        tmp_path, saves=True, clock=clock, sections=funded(2 * HOUR_CENTS)
    ) as yard:
        box = await yard.create(idleTimeout=0)
        yard.conduct.has_room_to_save = False
        clock.ahead = timedelta(hours=3)
        for _ in range(4):
            await yard.house.meter.charge_all()

            async def runs() -> bool:
                return (await yard.get(box))["status"] == "running"

            await eventually(runs)
        feed = (await get(yard.client, "/v1/activity", sandbox_id=box["id"]))["events"]
        assert len([one for one in feed if one["eventType"] == "sandbox.pausing"]) == 1
        told = await get(yard.client, "/v1/activity", event_type="billing.exhausted")
        assert len(told["events"]) == 1


async def test_who_is_silent_for_an_hour_is_paused(tmp_path: Path) -> None:
    """A guest can end its agent: nobody can use its machine then, and it costs nothing."""
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock, heartbeat_s=0.05) as yard:
        box = await yard.create(idleTimeout=0)
        yard.conduct.answers = False

        async def is_(status: str) -> bool:
            return (await yard.get(box))["status"] == status

        await eventually(lambda: is_("suspected_missing"))
        clock.ahead = timedelta(minutes=59)
        await looked(yard)
        assert await is_("suspected_missing")
        clock.ahead = timedelta(minutes=61)
        await eventually(lambda: is_("paused"))


@pytest.mark.parametrize("lives", [{"expiresIn": 3600}, {}])
async def test_a_dead_machine_that_is_deleted_is_charged_until_it_was_last_seen(
    tmp_path: Path, lives: dict[str, int]
) -> None:
    clock = AheadClock()
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:
        box = await yard.create(idleTimeout=0, **lives)
        await yard.house.meter.charge_all()
    clock.ahead = timedelta(hours=9)
    async with open_yard(tmp_path, saves=True, clock=clock) as yard:

        async def is_over() -> bool:
            async with yard.house.store.read() as tx:
                return (await tx.usage.of_sandbox(str(box["id"])))[0].ended_at is not None

        await eventually(is_over)
        async with yard.house.store.read() as tx:
            (period,) = await tx.usage.of_sandbox(str(box["id"]))
        assert period.ended_at is not None
        assert period.ended_at - period.started_at < timedelta(minutes=1)


async def test_the_ledger_is_paged(yard: Yard) -> None:
    for number in range(5):
        await post(yard.client, "/v1/billing/grants", amountCents=1 + number)
    path, seen, cursor = "/v1/billing/credits/history", [], None
    while True:
        query = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await yard.client.get(path, params=query)).json()
        seen += [one["amountCents"] for one in page["data"]]
        cursor = page["nextCursor"]
        assert page["hasMore"] is (cursor is not None)
        if cursor is None:
            break
    assert seen == [5, 4, 3, 2, 1, 10_000]


async def test_the_end_of_a_key_can_be_moved_and_never_beyond_that_of_who_asks(yard: Yard) -> None:
    made = await post(yard.client, "/v1/api-keys", name="k", expiresIn="30d")
    path = f"/v1/api-keys/{made['id']}"
    moved = (await yard.client.patch(path, json={"expiresIn": "1y"})).json()["data"]
    assert moved["expiresAt"] > made["expiresAt"]
    kept = (await yard.client.patch(path, json={"name": "other", "expiresIn": None})).json()["data"]
    assert (kept["name"], kept["expiresAt"]) == ("other", moved["expiresAt"])
    async with yard.client_of(made["key"]) as brief:
        other = await post(yard.client, "/v1/api-keys", name="long")
        bounded = (
            await brief.patch(f"/v1/api-keys/{other['id']}", json={"expiresIn": "never"})
        ).json()["data"]
        assert bounded["expiresAt"] == moved["expiresAt"]
    never = (await yard.client.patch(path, json={"expiresIn": "never"})).json()["data"]
    assert never["expiresAt"] is None
    assert (await yard.client.patch(path, json={"expiresIn": "soon"})).status_code == 400
