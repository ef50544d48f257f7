"""The API through its front door, on a whole house with fake machines."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.house import EACH_STORE, Yard, eventually, open_yard, store_section, until

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.node_ops import Report
from sandyard.server.core.states import Status
from sandyard.server.service.readiness import Readiness

FIELDS = {
    "id", "name", "status", "tags", "template", "templateDigest", "ownerUserId",
    "ownerDisplayName", "ownerEmail",
    "projectId", "mounts", "hasWritableWorkspaceMount", "sshReady", "vncReady", "ip", "publicIp",
    "sshAccessConfigured", "sshAuthMethod", "vncUrl", "resources", "createdAt",
    "updatedAt", "startedAt", "pausedAt", "lastActivityAt", "lastActivityKind", "idleTimeout",
    "metadata", "statusReason", "nodeId", "driver", "os", "autoResume", "expiresAt", "onExpiry",
}  # fmt: skip
KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"


def nested(depth: int) -> list[object]:
    result: list[object] = []
    for _ in range(depth):
        result = [result]
    return result


@pytest.fixture
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    async with (
        store_section(getattr(request, "param", "sqlite")) as sections,
        open_yard(tmp_path, sections=sections) as opened,
    ):
        yield opened


# --- create, get, list, delete --------------------------------------------------------------------


async def test_the_smallest_create_answers_201_with_every_field(yard: Yard) -> None:
    answer = await yard.client.post("/v1/sandboxes", json={"template": "base-ubuntu"})
    assert answer.status_code == 201
    body = answer.json()
    data = body["data"]
    assert set(data) == FIELDS
    assert re.fullmatch(r"sandbox-[a-z0-9]{12}", data["id"])
    assert data["status"] in ("pending", "creating", "running")
    assert data["resources"] == {"vcpus": 2, "memory": "4GB", "disk": "10GB"}
    assert data["idleTimeout"] == 600
    assert data["sshAuthMethod"] == "none"
    assert (data["sshReady"], data["vncReady"], data["vncUrl"]) == (False, False, None)
    assert data["createdAt"].endswith("Z")
    assert body["meta"]["requestId"] == answer.headers["x-request-id"]


async def test_the_status_goes_from_creating_to_running(yard: Yard) -> None:
    yard.conduct.start_delay_s = 0.2
    answer = await yard.client.post("/v1/sandboxes", json={})
    data = answer.json()["data"]
    assert data["status"] == "creating"
    seen = {data["status"]}

    async def runs() -> bool:
        got = await yard.client.get(f"/v1/sandboxes/{data['id']}")
        seen.add(got.json()["data"]["status"])
        return "running" in seen

    await eventually(runs)
    assert seen == {"creating", "running"}


async def test_a_running_sandbox_tells_where_it_runs(yard: Yard) -> None:
    data = await yard.create(
        name="My box", tags=["a"], env={"A": "secret-value"}, rootPassword="correct horse",
        metadata={"k": [1]}, sshKeys=[KEY_LINE], resources={"memory": "1024MB"}, expiresIn=3600,
    )  # fmt: skip
    assert data["status"] == "running"
    assert data["driver"] == "fake"
    assert data["ip"]
    assert data["sshAuthMethod"] == "key_and_password"
    assert data["sshAccessConfigured"] is True
    assert data["resources"] == {"vcpus": 2, "memory": "1GB", "disk": "10GB"}
    assert data["metadata"] == {"k": [1]}
    got = await yard.client.get("/v1/sandboxes/My box")
    assert got.json()["data"]["id"] == data["id"]
    for text in ("secret-value", "correct horse", "$2b$"):
        assert text not in got.text


async def test_lists_page_and_filter(yard: Yard) -> None:
    made = [(await yard.create(tags=["even"] if number % 2 else []))["id"] for number in range(5)]
    first = (await yard.client.get("/v1/sandboxes", params={"limit": 3})).json()
    assert [one["id"] for one in first["data"]] == made[:1:-1]
    assert first["hasMore"] is first["meta"]["hasMore"] is True
    assert first["nextCursor"] == first["meta"]["nextCursor"]
    rest = await yard.client.get("/v1/sandboxes", params={"cursor": first["nextCursor"]})
    assert [one["id"] for one in rest.json()["data"]] == made[1::-1]
    assert (rest.json()["hasMore"], rest.json()["nextCursor"]) == (False, None)

    async def count(**query: object) -> int:
        answer = await yard.client.get("/v1/sandboxes", params=query)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        return len(answer.json()["data"])

    assert await count(tag="even") == 2
    assert await count(tag=["even", "odd"]) == 0
    assert await count(status="running") == 5
    assert await count(status="failed") == 0
    assert await count(template="other") == 0
    assert await count(exclude_template="base-ubuntu") == 0
    assert await count(unknown="ignored") == 5
    assert await count(tag=["even"] * 32, limit=1, cursor=first["nextCursor"]) == 1
    refused = await yard.client.get("/v1/sandboxes", params={"tag": ["even"] * 33})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_request")
    await yard.client.delete(f"/v1/sandboxes/{made[0]}")
    assert await count() == 4


async def test_delete_waits_until_it_is_gone_and_then_it_is_unknown(yard: Yard) -> None:
    data = await yard.create()
    gone = await yard.client.delete(f"/v1/sandboxes/{data['id']}")
    assert gone.status_code == 200
    assert gone.json()["data"] == {"id": data["id"], "deleted": True}
    assert not yard.host.machines
    for again in ("delete", "get"):
        answer = await yard.client.request(again, f"/v1/sandboxes/{data['id']}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


async def test_two_deletes_at_once_both_succeed(yard: Yard) -> None:
    data = await yard.create()
    answers = await asyncio.gather(
        *(yard.client.delete(f"/v1/sandboxes/{data['id']}") for _ in range(2))
    )
    assert [answer.status_code for answer in answers] == [200, 200]


async def test_delete_while_creating_leaves_nothing(yard: Yard) -> None:
    yard.conduct.start_delay_s = 30
    created = (await yard.client.post("/v1/sandboxes", json={})).json()["data"]

    async def creating() -> bool:
        return bool(yard.host.machines)

    await eventually(creating)
    answer = await yard.client.delete(f"/v1/sandboxes/{created['id']}")
    assert answer.status_code == 200
    assert not yard.host.machines
    assert (await yard.house.node.do(Report())).machines == ()


async def test_an_async_delete_answers_202(yard: Yard) -> None:
    data = await yard.create()
    answer = await yard.client.delete(f"/v1/sandboxes/{data['id']}", params={"async": "true"})
    assert answer.status_code == 202
    assert answer.json()["data"]["deleted"] is False

    async def gone() -> bool:
        got = await yard.client.get(f"/v1/sandboxes/{data['id']}")
        return got.status_code == 404

    await eventually(gone)


async def test_a_name_is_free_again_after_a_delete(yard: Yard) -> None:
    await yard.create(name="box")
    answer = await yard.client.post("/v1/sandboxes", json={"name": "box"})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "conflict"
    await yard.client.delete("/v1/sandboxes/box")
    await yard.create(name="box")


async def test_a_sandbox_ends_when_its_time_is_over(yard: Yard) -> None:
    data = await yard.create(expiresIn=1)

    async def gone() -> bool:
        return (await yard.client.get(f"/v1/sandboxes/{data['id']}")).status_code == 404

    await eventually(gone)
    assert not yard.host.machines


# --- what goes wrong with machines ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("conduct", "word"),
    [
        ({"dies_at_birth": True}, "ended"),
        ({"is_ready": False, "is_given_up": True}, "ended while it started"),
        ({"starts": False}, "told not to"),
        ({"is_ready": False, "makes_progress": False}, "no progress"),
        ({"is_ready": False}, "did not answer"),
    ],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, conduct: dict[str, bool], word: str
) -> None:
    async with open_yard(tmp_path, boot_s=0.6, no_progress_s=0.2) as yard:
        for name, value in conduct.items():
            setattr(yard.conduct, name, value)
        data = await yard.create()
        assert data["status"] == "failed"
        reason = data["statusReason"]
        assert isinstance(reason, dict)
        assert word in reason["message"]
        assert not yard.host.machines
        assert (await yard.house.node.do(Report())).machines == ()
        used = await yard.client.post(f"/v1/sandboxes/{data['id']}/exec", json={"command": "x"})
        assert used.status_code == 409
        assert used.json()["error"]["details"] == {"status": "failed"}
        assert (await yard.client.delete(f"/v1/sandboxes/{data['id']}")).status_code == 200


async def test_a_machine_that_dies_makes_an_error_with_its_reason(yard: Yard) -> None:
    data = await yard.create()
    (machine,) = yard.host.machines.values()
    machine.die()

    async def in_error() -> bool:
        got = (await yard.client.get(f"/v1/sandboxes/{data['id']}")).json()["data"]
        return bool(got["status"] == "error" and got["statusReason"]["code"] == "machine_died")

    await eventually(in_error)
    async with yard.house.store.read() as tx:
        (period,) = await tx.usage.of_sandbox(str(data["id"]))
    assert period.ended_at is not None
    assert (await yard.client.delete(f"/v1/sandboxes/{data['id']}")).status_code == 200


async def test_a_machine_that_dies_during_an_exec_ends_it_at_once(yard: Yard) -> None:
    data = await yard.create()
    path = f"/v1/sandboxes/{data['id']}/exec"
    hanging = asyncio.ensure_future(yard.client.post(path, json={"command": "hang"}))
    machine = yard.machine_of(data)
    await until(lambda: machine.executing == ["hang"])
    machine.die()
    answer = await asyncio.wait_for(hanging, 60)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "invalid_state"
    assert "machine" in answer.json()["error"]["message"]


async def test_a_machine_that_cannot_be_stopped_is_tried_until_it_can(yard: Yard) -> None:
    data = await yard.create()
    yard.conduct.can_be_stopped = False
    await yard.client.delete(f"/v1/sandboxes/{data['id']}", params={"async": "true"})

    async def destroying() -> bool:
        got = await yard.client.get(f"/v1/sandboxes/{data['id']}")
        return bool(got.json()["data"]["status"] == "destroying")

    await eventually(destroying)
    assert yard.host.machines
    yard.conduct.can_be_stopped = True

    async def gone() -> bool:
        return (await yard.client.get(f"/v1/sandboxes/{data['id']}")).status_code == 404

    await eventually(gone)
    assert not yard.host.machines


async def test_a_machine_nobody_wants_is_removed(yard: Yard) -> None:
    data = await yard.create()
    async with yard.house.store.write(Turn.ALONE) as tx:
        found = await tx.sandboxes.find(str(data["id"]))
        assert found is not None
        found.__dict__["status"] = Status.DESTROYED
        assert await tx.sandboxes.replace(found)

    async def gone() -> bool:
        return not yard.host.machines

    await eventually(gone)


async def test_a_stalled_machine_says_why_and_goes_on(yard: Yard) -> None:
    from sandyard.server.drivers.contract import End

    data = await yard.create()
    (machine,) = yard.host.machines.values()

    async def reason() -> object:
        got = await yard.client.get(f"/v1/sandboxes/{data['id']}")
        return got.json()["data"]["statusReason"]

    machine.stalled = End("host_disk_full", "no room")

    async def told() -> bool:
        return await reason() == {"code": "host_disk_full", "message": "no room"}

    async def cleared() -> bool:
        return await reason() is None

    await eventually(told)
    machine.stalled = None
    await eventually(cleared)


async def test_machines_outlive_the_house(tmp_path: Path) -> None:
    async with open_yard(tmp_path, keep=True) as yard:
        data = await yard.create(name="lives")
        host = yard.host
    assert host.machines
    async with open_yard(tmp_path, host=host) as yard:
        answer = await yard.client.post("/v1/sandboxes/lives/exec", json={"command": "still"})
        assert answer.json()["data"]["stdout"] == "still"
        assert (await yard.client.delete(f"/v1/sandboxes/{data['id']}")).status_code == 200
    assert not host.machines


async def test_a_restart_finds_what_died_meanwhile(tmp_path: Path) -> None:
    async with open_yard(tmp_path, keep=True) as yard:
        data = await yard.create()
        host = yard.host
    for machine in list(host.machines.values()):
        machine.die()
    async with open_yard(tmp_path, host=host) as yard:

        async def in_error() -> bool:
            got = await yard.client.get(f"/v1/sandboxes/{data['id']}")
            return bool(got.json()["data"]["status"] == "error")

        await eventually(in_error)


async def test_the_full_host_is_told_as_no_capacity(tmp_path: Path) -> None:
    async with open_yard(tmp_path, disk_floor_mib=10**9) as yard:
        answer = await yard.client.post("/v1/sandboxes", json={})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_capacity"
        assert answer.headers["retry-after"]


async def test_a_template_that_is_not_built_is_told_with_the_remedy(tmp_path: Path) -> None:
    async with open_yard(tmp_path) as yard:
        (tmp_path / "templates/base-ubuntu.json").unlink()
        answer = await yard.client.post("/v1/sandboxes", json={})
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert "sandyard template build base-ubuntu" in error["message"]
        assert (error["code"], error["details"]["reason"]) == (
            "invalid_state",
            "template_not_built",
        )
        listed = (await yard.client.get("/v1/templates/base-ubuntu")).json()["data"]
        assert listed["status"] == "pending"


# --- exec and stats -------------------------------------------------------------------------------


async def test_exec_answers_in_the_contracts_form(yard: Yard) -> None:
    data = await yard.create()
    answer = await yard.client.post(f"/v1/sandboxes/{data['id']}/exec", json={"command": "hi"})
    assert answer.status_code == 200
    assert answer.json()["data"] == {
        "stdout": "hi", "stderr": "", "exitCode": 0, "durationMs": 1, "executionTime": 1,
        "timedOut": False, "truncated": False, "signal": None,
    }  # fmt: skip
    got = (await yard.client.get(f"/v1/sandboxes/{data['id']}")).json()["data"]
    assert got["lastActivityKind"] == "exec"
    feed = (await yard.client.get(f"/v1/sandboxes/{data['id']}/activity")).json()["data"]
    kinds = [line["eventType"] for line in feed["events"]]
    assert kinds == ["sandbox.exec", "sandbox.running", "sandbox.created"]


async def test_exec_waits_for_a_sandbox_on_its_way_up(yard: Yard) -> None:
    yard.conduct.start_delay_s = 0.3
    data = (await yard.client.post("/v1/sandboxes", json={})).json()["data"]
    answer = await yard.client.post(f"/v1/sandboxes/{data['id']}/exec", json={"command": "hi"})
    assert answer.json()["data"]["stdout"] == "hi"


async def test_stats_are_told_in_full(yard: Yard) -> None:
    data = await yard.create()
    answer = (await yard.client.get(f"/v1/sandboxes/{data['id']}/stats")).json()["data"]
    assert answer["sandboxId"] == data["id"]
    assert set(answer["stats"]) == {
        "cpuPercent", "memoryUsedBytes", "memoryTotalBytes", "diskUsedBytes", "diskTotalBytes",
        "uptime",
    }  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"template": "nope"}, "template"),
        ({"template": 7}, "template"),
        ({"template": "a\x00b"}, "template"),
        ({"name": ""}, "name"),
        ({"name": "a\x00"}, "name"),
        ({"name": "sandbox-abcdefghijkl"}, "name"),
        ({"name": 5}, "name"),
        ({"tags": "a"}, "tags"),
        ({"tags": [""]}, "tags"),
        ({"name": "a/b"}, "name"),
        ({"name": "."}, "name"),
        ({"name": ".."}, "name"),
        ({"tags": ["x"] * 33}, "tags"),
        ({"idleTimeout": -1}, "idleTimeout"),
        ({"idleTimeout": 604_801}, "idleTimeout"),
        ({"idleTimeout": "600"}, "idleTimeout"),
        ({"idleTimeout": 1.5}, "idleTimeout"),
        ({"idleTimeout": True}, "idleTimeout"),
        ({"resources": {"vcpus": 0}}, "resources.vcpus"),
        ({"resources": {"memory": "4"}}, "resources.memory"),
        ({"resources": {"disk": "1TB"}}, "resources.disk"),
        ({"env": {"1A": "x"}}, "env"),
        ({"env": {"A": 1}}, "env.A"),
        ({"env": {"A": "x" * 70_000}}, "env"),
        ({"sshKeys": ["00000000-0000-0000-0000-000000000000"]}, "sshKeys"),
        ({"sshKeys": ["ssh-ed25519 AAAA"]}, "sshKeys"),
        ({"rootPassword": "short"}, "rootPassword"),
        ({"rootPassword": "x" * 73}, "rootPassword"),
        ({"projectId": "00000000-0000-0000-0000-000000000000"}, "projectId"),
        ({"projectId": "x"}, "projectId"),
        ({"metadata": {"a": "x" * 17_000}}, "metadata"),
        ({"metadata": {"a": {"b": "\x00"}}}, "metadata"),
        ({"metadata": {"a": ["\ud800"]}}, "metadata"),
        ({"metadata": {"a": nested(100)}}, "metadata"),
        ({"snapshot": "s"}, "snapshot"),
        ({"network": {"egress": "maybe"}}, "network.egress"),
        ({"network": {"allow": ["*"]}}, "network.allow"),
        ({"network": {"allow": [5]}}, "network.allow.0"),
        ({"network": {"deny": ["example.com"]}}, "network.deny"),
        ({"network": {"inspect": ["example.com:443"]}}, "network.inspect"),
        ({"network": {"inject": [{"host": "example.com"}]}}, "network.inject.0.headers"),
        ({"network": {"inject": [{"host": "a.com", "headers": {}}]}}, "network.inject"),
        ({"network": {"inject": [{"host": "a.com", "headers": {"X": "${B}"}}]}}, "network.inject"),
        ({"network": ["deny"]}, "network"),
        ({"expiresIn": 0}, "expiresIn"),
        ({"onExpiry": "explode"}, "onExpiry"),
        ([], "body"),
    ],
)
async def test_a_create_that_cannot_be_is_refused_by_field(
    yard: Yard, body: object, field: str
) -> None:
    answer = await yard.client.post(
        "/v1/sandboxes", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "bad_request"
    assert error["details"]["field"] == field
    assert error["requestId"] == answer.headers["x-request-id"]
    assert (await yard.client.get("/v1/sandboxes")).json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [
        {}, {"command": ""}, {"command": "a\x00b"}, {"command": 1}, {"command": "x" * (2**21 + 1)},
        {"command": "x", "timeout": 0}, {"command": "x", "timeout": 3_600_001},
        {"command": "x", "timeout": "1"}, {"command": "x", "cwd": ""},
        {"command": "x", "env": {"A=B": "c"}}, {"command": "x", "encoding": "latin-1"},
        {"command": "x", "user": ""}, {"command": "\ud800"}, {"command": "x", "stdin": "\ud800"},
        {"command": "x", "stdin": "?", "stdinEncoding": "base64"},
        {"command": "x", "stdinEncoding": "latin-1"},
    ],
)  # fmt: skip
async def test_an_exec_that_cannot_be_is_refused(yard: Yard, body: dict[str, object]) -> None:
    data = await yard.create()
    answer = await yard.client.post(
        f"/v1/sandboxes/{data['id']}/exec",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "bad_request"


async def test_malformed_json_is_told_as_such(yard: Yard) -> None:
    for content in (b"{", b"\xff", b'{"template": "base-ubuntu"', b""):
        answer = await yard.client.post(
            "/v1/sandboxes", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "bad_request"


async def test_unknown_body_fields_are_ignored(yard: Yard) -> None:
    assert (await yard.create(fromTheFuture={"x": 1}))["status"] == "running"


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/v1/sandboxes", 256 * 1024),
        ("/v1/projects", 64 * 1024),
        ("/v1/sandboxes/x/exec", 24 * 2**20),
    ],
)
async def test_too_large_a_body_is_refused(yard: Yard, path: str, limit: int) -> None:
    for size, status in ((limit, {400, 404}), (limit + 1, {413})):
        body = b'{"name": "'.ljust(size - 2, b"x") + b'"}'
        answer = await yard.client.post(
            path, content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code in status, answer.text
    assert answer.json()["error"]["code"] == "payload_too_large"
    assert answer.json()["error"]["details"] == {"limit": limit, "reason": "too_large"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 60_000,
        b'{"metadata":' * 300,
        '{"name": "\u2200"}'.encode("utf-16"),
        '{"name": "\u2200"}'.encode("utf-32"),
        b'{"tags": [' + b"[]," * 21_000 + b"[]]}",
        b'{"env": {' + b'"a":"b",' * 21_000 + b'"a":"b"}}',
    ],
)
async def test_a_body_of_too_many_or_too_deep_values_is_refused(yard: Yard, body: bytes) -> None:
    answer = await yard.client.post("/v1/sandboxes", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["field"] == "body"
    assert re.match("cannot (take|read) the body", answer.json()["error"]["message"])


async def test_what_is_in_strings_is_not_counted(yard: Yard) -> None:
    box = await yard.create(metadata={"text": ',[{"\\' * 1000})
    assert box["status"] == "running"


async def test_a_body_without_a_type_is_json_and_another_type_is_refused(yard: Yard) -> None:
    answer = await yard.client.post("/v1/sandboxes", content=b'{"name": "untyped"}')
    assert (answer.status_code, answer.json()["data"]["name"]) == (201, "untyped")
    for kind in ("application/x-www-form-urlencoded", "text/plain; charset=utf-8"):
        answer = await yard.client.post(
            "/v1/sandboxes", content=b"{}", headers={"Content-Type": kind}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["details"]["field"] == "Content-Type"
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


async def test_null_means_not_given(yard: Yard) -> None:
    fields = (
        "template", "name", "tags", "mounts", "idleTimeout", "resources", "env", "sshKeys",
        "rootPassword", "projectId", "metadata", "autoResume", "expiresIn", "network", "snapshot",
    )  # fmt: skip
    box = await yard.create(**dict.fromkeys(fields))
    assert (box["template"], box["idleTimeout"], box["tags"]) == ("base-ubuntu", 600, [])
    box = await yard.create(resources={"vcpus": None, "memory": "1GB"}, env={"A": None})
    assert box["resources"] == {"vcpus": 2, "memory": "1GB", "disk": "10GB"}
    command = dict.fromkeys(("timeout", "cwd", "env", "stdin", "stdinEncoding", "user", "encoding"))
    answer = await yard.client.post(
        f"/v1/sandboxes/{box['id']}/exec", json={"command": "x", **command}
    )
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 501}, {"limit": "x"}, {"status": "odd"}])
async def test_a_list_query_that_cannot_be_is_refused(yard: Yard, query: dict[str, str]) -> None:
    assert (await yard.client.get("/v1/sandboxes", params=query)).status_code == 400


@pytest.mark.parametrize("cursor", ["x", "W10", "bnVsbA", "é", "W1tdLCAxXQ"])
async def test_a_made_up_cursor_is_refused(yard: Yard, cursor: str) -> None:
    answer = await yard.client.get("/v1/sandboxes", params={"cursor": cursor})
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["field"] == "cursor"


async def test_unknown_paths_and_methods_come_in_the_envelope(yard: Yard) -> None:
    answer = await yard.client.get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = await yard.client.put("/v1/sandboxes")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "bad_request")
    assert answer.headers["allow"] == "HEAD, GET, POST"
    answer = await yard.client.post("/v1/sandboxes/x")
    assert answer.headers["allow"] == "HEAD, GET, PATCH, DELETE"


async def test_head_is_get_without_its_body(yard: Yard) -> None:
    for path in ("/v1/sandboxes", "/healthz", "/", "/v1/sandboxes/nothing"):
        got, headed = await yard.client.get(path), await yard.client.head(path)
        assert (headed.status_code, headed.content) == (got.status_code, b"")
        assert headed.headers["content-length"] == got.headers["content-length"]


async def test_what_is_not_built_yet_says_so_and_not_that_it_is_gone(yard: Yard) -> None:
    for method, path in (
        ("POST", "/v1/webhooks"), ("GET", "/v1/webhooks/x"), ("GET", "/v1/x"),
    ):  # fmt: skip
        answer = await yard.client.request(method, path)
        wanted = (404, "not_found") if path == "/v1/x" else (501, "not_implemented")
        assert (answer.status_code, answer.json()["error"]["code"]) == wanted, path
        async with yard.client_of(None) as nobody:
            assert (await nobody.request(method, path)).status_code == 401


async def test_a_browser_is_told_what_this_is_and_loads_nothing_from_elsewhere(yard: Yard) -> None:
    async with yard.client_of(None) as nobody:
        front = await nobody.get("/")
        assert front.status_code == 200
        for path in ("/docs", "/openapi.json", "/healthz", "/readyz"):
            assert f'href="{path}"' in front.text
            assert (await nobody.get(path)).status_code == 200
        docs = await nobody.get("/docs")
        assert "http" not in docs.text
        assert "script-src 'self';" in docs.headers["content-security-policy"]
        for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js"):
            assert f"/docs/{name}" in docs.text
            assert (await nobody.get(f"/docs/{name}")).status_code == 200
        assert (await nobody.get("/docs/secret.key")).status_code == 404
        assert (await nobody.get("/docs/..%2f__init__.py")).status_code == 404


async def test_pages_of_other_origins_may_call_only_where_that_is_set(
    yard: Yard, tmp_path: Path
) -> None:
    asks = {
        "Origin": "https://app.example.org", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }  # fmt: skip
    answer = await yard.client.options("/v1/sandboxes", headers=asks)
    assert "access-control-allow-origin" not in answer.headers
    sections = {"http": {"cors_origins": ["https://app.example.org"]}}
    async with open_yard(tmp_path / "open", sections=sections) as other:
        answer = await other.client.options("/v1/sandboxes", headers=asks)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
        origin = {"Origin": "https://app.example.org"}
        answer = await other.client.get("/v1/sandboxes", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
        answer = await other.client.get("/v1/sandboxes", headers={"Origin": "https://evil.org"})
        assert "access-control-allow-origin" not in answer.headers


async def test_the_description_knows_the_organization_and_the_bounds(yard: Yard) -> None:
    description = (await yard.client.get("/openapi.json")).json()
    for path, methods in description["paths"].items():
        for operation in methods.values():
            names = [one.get("name") for one in operation.get("parameters", [])]
            assert ("orgId" in names) is path.startswith("/v1"), path
    fields = description["components"]["schemas"]["CreateSandbox"]["properties"]
    assert (fields["idleTimeout"]["minimum"], fields["idleTimeout"]["maximum"]) == (0, 604_800)
    assert fields["tags"]["maxItems"] == 32
    assert "expiresIn" in description["components"]["schemas"]["PatchSandbox"]["properties"]


# --- who may --------------------------------------------------------------------------------------


async def test_a_missing_scope_is_named(yard: Yard) -> None:
    key = await yard.add_key(*await yard.first(), scopes=("sandbox:read",))
    async with yard.client_of(key) as client:
        answer = await client.post("/v1/sandboxes", json={})
        assert answer.status_code == 403
        assert answer.json()["error"]["details"] == {"requiredScope": "sandbox:create"}
        assert (await client.get("/v1/sandboxes")).status_code == 200


async def test_a_member_sees_its_own_and_an_admin_all(yard: Yard) -> None:
    org_id, _ = await yard.first()
    member = await yard.add_key(org_id, await yard.add_member(org_id))
    admins = await yard.create()
    async with yard.client_of(member) as client:
        assert (await client.get(f"/v1/sandboxes/{admins['id']}")).status_code == 404
        assert (await client.delete(f"/v1/sandboxes/{admins['id']}")).status_code == 404
        own = (await client.post("/v1/sandboxes", json={})).json()["data"]
        listed = (await client.get("/v1/sandboxes")).json()["data"]
        assert [one["id"] for one in listed] == [own["id"]]
        scoped = await yard.add_key(org_id, await yard.add_member(org_id), scopes=("sandbox:read",))
        async with yard.client_of(scoped) as reader:
            answer = await reader.get("/v1/sandboxes", params={"all": "true"})
            assert answer.status_code == 403
        got = await yard.client.get(f"/v1/sandboxes/{own['id']}")
        assert got.status_code == 200
        assert got.json()["data"]["nodeId"] is not None or own["status"] == "pending"
        assert (await client.get(f"/v1/sandboxes/{own['id']}")).json()["data"]["nodeId"] is None


async def test_the_other_header_is_taken_and_bearer_wins(yard: Yard) -> None:
    async with yard.client_of(None) as client:
        headers = {"X-API-Key": yard.key}
        assert (await client.get("/v1/sandboxes", headers=headers)).status_code == 200
        both = {**headers, "Authorization": "Bearer garbage"}
        assert (await client.get("/v1/sandboxes", headers=both)).status_code == 401


# --- operations -----------------------------------------------------------------------------------


async def test_health_readiness_and_metrics_need_no_credential(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    await yard.create()
    async with yard.client_of(None) as client:
        assert (await client.get("/healthz")).json() == {
            "status": "ok",
            "missing": [],
            "limited": [],
        }
        assert (await client.get("/readyz")).json() == {
            "status": "ok",
            "missing": [],
            "limited": [],
        }
        assert (await client.get("/servez")).json()["status"] == "ok"
        with monkeypatch.context() as patched:
            patched.setattr(Readiness, "cannot_serve", "the database does not answer")
            answer = await client.get("/servez")
        assert (answer.status_code, answer.json()["status"]) == (503, "unready")
        metrics = await client.get("/metrics")
        running = r'^sandyard_machines\{node="\S+",state="running"\} 1.0'
        assert re.search(running, metrics.text, re.M)
        assert 'sandyard_nodes{state="answering"} 1.0' in metrics.text
        assert 'sandyard_nodes{state="silent"} 0.0' in metrics.text
        assert "sandyard_http_requests_total" in metrics.text
        for name in ("X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Via", "X-Real-IP"):
            assert (await client.get("/metrics", headers={name: "1.2.3.4"})).status_code == 404


async def test_readiness_says_what_is_missing(tmp_path: Path) -> None:
    async with open_yard(tmp_path) as yard:
        for path in (tmp_path / "templates").iterdir():
            path.unlink()

        async def unready() -> bool:
            answer = await yard.client.get("/readyz")
            return answer.status_code == 503 and "template" in answer.json()["missing"][0]

        await eventually(unready)


async def test_fifty_creates_at_once_all_run_and_none_leaks(yard: Yard) -> None:
    made = await asyncio.gather(*(yard.create() for _ in range(50)))
    assert {one["status"] for one in made} == {"running"}
    assert len({one["ip"] for one in made}) == 50
    await asyncio.gather(*(yard.client.delete(f"/v1/sandboxes/{one['id']}") for one in made))
    assert not yard.host.machines


async def test_what_a_stranger_sends_is_not_even_read(yard: Yard) -> None:
    async with yard.client_of(None) as client:
        answer = await client.post("/v1/sandboxes", content=b"{not json")
    assert answer.status_code == 401
    assert answer.headers["x-request-id"] == answer.json()["error"]["requestId"]


async def test_an_error_nobody_foresaw_comes_in_the_envelope_and_is_not_explained(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(yard.house.api.state.services.sandboxes), "get", broken)
    answer = await yard.client.get("/v1/sandboxes/x")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-request-id"] == answer.json()["error"]["requestId"]
    assert "secret" not in answer.text


async def test_a_changed_driver_setting_keeps_the_disks_of_machines(tmp_path: Path) -> None:
    async with open_yard(tmp_path, keep=True) as yard:
        data = await yard.create()
        host = yard.host
    (record,) = tmp_path.glob("machines/*/resident.json")
    record.write_text(record.read_text().replace('"driver": "fake"', '"driver": "gone"'))
    async with open_yard(tmp_path, host=host) as yard:

        async def in_error() -> bool:
            got = (await yard.client.get(f"/v1/sandboxes/{data['id']}")).json()["data"]
            return bool(
                got["status"] == "error" and got["statusReason"]["code"] == "driver_missing"
            )

        await eventually(in_error)
        assert (record.parent / "body-1/disk.ext4").exists()


async def test_a_record_that_cannot_be_read_costs_no_disk(tmp_path: Path) -> None:
    async with open_yard(tmp_path, keep=True) as yard:
        await yard.create()
        host = yard.host
    (folder,) = tmp_path.glob("machines/*")
    (folder / "resident.json").write_text("{broken")
    async with open_yard(tmp_path, host=host):
        assert (folder / "body-1/disk.ext4").exists()


@pytest.mark.parametrize("yard", EACH_STORE, indirect=True)
async def test_secrets_over_http(yard: Yard) -> None:
    body = {"name": "github", "value": "hidden-7c1", "hosts": ["API.github.com", "*.github.com"]}
    answer = await yard.client.post("/v1/secrets", json=body)
    assert answer.status_code == 201
    made = answer.json()["data"]
    assert set(made) == {"id", "name", "hosts", "createdAt", "changedAt", "lastUsedAt"}
    assert (made["name"], made["hosts"]) == ("GITHUB", ["api.github.com", "*.github.com"])
    assert (await yard.client.post("/v1/secrets", json=body)).status_code == 409
    sharp = {**body, "name": "pa\u00df"}  # whose upper case is PASS
    assert (await yard.client.post("/v1/secrets", json=sharp)).status_code == 400
    assert (await yard.client.get("/v1/secrets")).json()["data"] == [made]
    inject = [{"host": "api.github.com", "headers": {"Authorization": "Bearer ${GITHUB}"}}]
    box = await yard.create(network={"inject": inject})
    path = f"/v1/sandboxes/{box['id']}/network"
    shown = (await yard.client.get(path)).json()["data"]
    assert shown == {"egress": "allow", "allow": [], "deny": [], "inspect": [], "inject": inject}
    wrong = {"inject": [{"host": "example.com", "headers": {"X": "${GITHUB}"}}]}
    answer = await yard.client.put(path, json=wrong)
    assert (answer.status_code, "and not for example.com" in answer.text) == (400, True)
    answer = await yard.client.put("/v1/secrets/github", json={"value": "hidden-8d2"})
    assert (answer.status_code, "hidden" in answer.text) == (200, False)
    bodies: list[tuple[dict[str, object], str]] = [
        ({"name": "a-b"}, "name"), ({"name": "1A"}, "name"), ({"value": ""}, "value"),
        ({"value": "a\nb"}, "value"), ({"value": " a"}, "value"),
        ({"value": "x" * 17_000}, "value"),
        ({"hosts": []}, "hosts"), ({"hosts": ["*"]}, "hosts"), ({"hosts": ["1.2.3.4"]}, "hosts"),
        ({"hosts": ["a.com:443"]}, "hosts"),
    ]  # fmt: skip
    for wrong_, field in bodies:
        answer = await yard.client.post("/v1/secrets", json=body | {"name": "OTHER"} | wrong_)
        assert answer.status_code == 400, wrong_
        assert field in answer.json()["error"]["message"], answer.text
    assert (await yard.client.put("/v1/secrets/GITHUB", json={})).status_code == 400
    for name in ("NONE", "a%00b"):
        answer = await yard.client.put(f"/v1/secrets/{name}", json={"value": "x"})
        assert answer.status_code in (400, 404)
    answer = await yard.client.delete("/v1/secrets/GITHUB")
    assert answer.json()["data"] == {"id": made["id"], "deleted": True}
    assert (await yard.client.delete("/v1/secrets/GITHUB")).status_code == 404
    lines = (await yard.client.get("/v1/activity")).json()["data"]["events"]
    assert {"secret.added", "secret.replaced", "secret.deleted"} <= {
        one["eventType"] for one in lines
    }
    assert "hidden" not in str(lines)


@pytest.mark.parametrize("yard", EACH_STORE, indirect=True)
async def test_network_rules_over_http(yard: Yard) -> None:
    made = await yard.create(network={"egress": "deny", "allow": ["GitHub.com", "github.com:22"]})
    path = f"/v1/sandboxes/{made['id']}"
    no_tls: dict[str, object] = {"inspect": [], "inject": []}
    shown: dict[str, object] = {
        "egress": "deny", "allow": ["github.com", "github.com:22"], "deny": [], **no_tls,
    }  # fmt: skip
    assert (await yard.client.get(f"{path}/network")).json()["data"] == shown
    answer = await yard.client.put(f"{path}/network", json={"deny": ["203.0.113.7"]})
    shown = {"egress": "allow", "allow": [], "deny": ["203.0.113.7/32"], **no_tls}
    assert (answer.status_code, answer.json()["data"]) == (200, shown)
    answer = await yard.client.patch(path, json={"name": "ruled"})
    assert (await yard.client.get(f"{path}/network")).json()["data"] == shown, "as they were"
    answer = await yard.client.patch(path, json={"network": {"egress": "deny"}})
    assert answer.status_code == 200
    shown = {"egress": "deny", "allow": [], "deny": [], **no_tls}
    assert (await yard.client.get("/v1/sandboxes/ruled/network")).json()["data"] == shown
    bodies: list[object] = [{"egress": "off"}, {"allow": ["a b"]}, {"deny": ["a.com"]}, []]
    for body in bodies:
        answer = await yard.client.put(f"{path}/network", json=body)
        assert answer.status_code == 400, body
    assert (await yard.client.get(f"{path}/egress")).json()["data"] == []
    assert (await yard.client.get(f"{path}/egress?since=-1")).status_code == 400
    # A client that follows has its share of the organization's streams.
    shares = yard.house.api.state.services.sandboxes._open._shares
    org = (await yard.client.get("/v1/organizations/current")).json()["data"]["id"]
    while shares.take(org, 1):
        pass
    refused = await yard.client.get(f"{path}/egress?follow=true")
    assert (refused.status_code, "are open" in refused.text) == (409, True)
    for method, below in (("GET", "network"), ("PUT", "network"), ("GET", "egress")):
        answer = await yard.client.request(method, f"/v1/sandboxes/nobodys/{below}", json={})
        assert answer.status_code == 404


async def test_text_that_may_have_nul_is_described_so_and_no_error_quotes_one(yard: Yard) -> None:
    box = (await yard.client.post("/v1/sandboxes?wait=10", json={})).json()["data"]
    wish = {"command": "cat", "stdin": "a\x00b"}
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/exec", json=wish)
    assert answer.status_code == 200, answer.text
    schemas = (await yard.client.get("/openapi.json")).json()["components"]["schemas"]
    fields = [
        ("Exec", "stdin"), ("WriteStdin", "data"), ("FileIn", "contents"), ("RunCode", "code"),
        ("RunCode", "stdin"), ("CreateEntry", "contents"), ("ChangeEntry", "contents"),
    ]  # fmt: skip
    for name, field in fields:
        assert "pattern" not in json.dumps(schemas[name]["properties"][field]), (name, field)
    assert "pattern" in schemas["CreateSandbox"]["properties"]["template"]
    for path in ("/v1/nothing/a%00b", "/v1/sandboxes/a%00b/files/metadata?path=/a%00b"):
        refused = (await yard.client.get(path)).json()["error"]
        assert "\x00" not in json.dumps(refused, ensure_ascii=False), path
