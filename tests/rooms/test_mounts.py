"""Workspaces in sandboxes: what may be mounted where, who uses what, and what a delete does."""

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.house import Yard, eventually, open_yard
from tests.support.several import open_several

from sandyard.server.core.ids import new_uuid
from sandyard.server.service.workspaces.workspaces import Workspaces

SANDBOXES, WORKSPACES = "/v1/sandboxes", "/v1/workspaces"


@pytest.fixture(params=["one", pytest.param("several", marks=pytest.mark.postgres)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    opening = open_yard(tmp_path, pool=1) if request.param == "one" else open_several()
    async with opening as made:
        yield made


async def a_workspace(yard: Yard, name: str = "Data") -> str:
    made = await yard.client.post(WORKSPACES, json={"name": name})
    return str(made.json()["data"]["id"])


def mount(workspace_id: str, path: str = "/workspace", **more: object) -> dict[str, object]:
    return {"workspaceId": workspace_id, "path": path, **more}


def mounted_in(yard: Yard, sandbox: Mapping[str, object]) -> dict[str, str]:
    """Return what the machine of a sandbox was told to mount."""
    found: dict[str, str] = json.loads(yard.machine_of(sandbox).remembers.get("mounts", "{}"))
    return found


async def usage_of(yard: Yard, workspace_id: str) -> dict[str, Any]:
    answer = await yard.client.get(f"{WORKSPACES}/{workspace_id}/usage")
    found: dict[str, Any] = answer.json()["data"]
    return found


async def test_what_is_mounted_is_shown_and_the_machine_has_it(yard: Yard) -> None:
    work, more = await a_workspace(yard), await a_workspace(yard, "More")
    wanted = [mount(more, "/workspace/in/more", readOnly=True), mount(work)]
    box = await yard.create(name="box", mounts=wanted)
    assert box["status"] == "running", box
    # Outer ones first, whatever the order they were named in.
    assert box["mounts"] == [
        mount(work, readOnly=False), mount(more, "/workspace/in/more", readOnly=True)
    ]  # fmt: skip
    assert box["hasWritableWorkspaceMount"] is True
    assert mounted_in(yard, box) == {"/workspace": work, "/workspace/in/more": more}
    usage = await usage_of(yard, more)
    assert usage["inUse"] is True
    assert usage["counts"]["mountedSandboxes"] == 1
    assert usage["mountedSandboxes"] == [
        {
            "sandboxId": box["id"], "sandboxName": "box", "sandboxStatus": "running",
            "mountPath": "/workspace/in/more", "readOnly": True,
        }
    ]  # fmt: skip
    reader = await yard.create(mounts=[mount(work, readOnly=True)])
    assert reader["hasWritableWorkspaceMount"] is False
    await yard.client.delete(f"{SANDBOXES}/{box['id']}")
    assert (await usage_of(yard, more))["inUse"] is False
    assert (await usage_of(yard, work))["counts"]["mountedSandboxes"] == 1


@pytest.mark.parametrize(
    "path",
    ["", "/", "workspace", "/workspaces", "/workspace/", "/workspace//a", "/workspace/../etc",
     "/workspace/./a", "/etc", "/workspace/a\0b", "/workspace/a\nb", "/workspace/" + "x" * 256,
     "/workspace" + "/x" * 600, "/Workspace", "/workspace/\u2028"],
)  # fmt: skip
async def test_a_path_that_is_none_is_refused(yard: Yard, path: str) -> None:
    answer = await yard.client.post(
        SANDBOXES, json={"mounts": [mount(await a_workspace(yard), path)]}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "bad_request"), path
    assert error["details"]["field"] == "mounts.0.path"


async def test_what_cannot_be_mounted_is_refused_and_leaves_nothing(yard: Yard) -> None:
    work = await a_workspace(yard)
    found = (await yard.client.get(WORKSPACES)).json()["data"]["workspaces"]
    personal = next(one["id"] for one in found if one["isPersonal"])
    slug = next(one["slug"] for one in found if one["id"] == work)
    for mounts, field in (
        ([mount(new_uuid())], "mounts.0.workspaceId"),
        ([mount(personal)], "mounts.0.workspaceId"),
        ([mount(slug)], "mounts.0.workspaceId"),
        ([mount("../x")], "mounts.0.workspaceId"),
        ([mount(work), mount(work)], "mounts.1.path"),
        ([mount(work), mount(work, "/workspace/b", readOnly=True)], "mounts.1.readOnly"),
        ([mount(work, f"/workspace/{n}") for n in range(17)], "mounts"),
        ([{"workspaceId": work}], "mounts.0.path"),
        ([{"path": "/workspace"}], "mounts.0.workspaceId"),
        ([mount(work, readOnly="perhaps")], "mounts.0.readOnly"),
        ("none", "mounts"),
    ):
        answer = await yard.client.post(SANDBOXES, json={"mounts": mounts})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["details"]["field"] == field
    assert (await yard.client.get(SANDBOXES)).json()["data"] == []
    twice = [mount(work), mount(work, "/workspace/again")]
    assert (await yard.create(mounts=twice))["status"] == "running"


async def test_another_organizations_workspace_is_as_if_it_were_not_there(yard: Yard) -> None:
    work = await a_workspace(yard)
    made = await yard.client.post("/v1/organizations", json={"name": "Other"})
    org_id = made.json()["data"]["id"]
    _, user_id = await yard.first()
    async with yard.client_of(await yard.add_key(org_id, user_id)) as other:
        answer = await other.post(SANDBOXES, json={"mounts": [mount(work)]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")


async def test_a_key_mounts_only_what_it_may_read_or_write(yard: Yard) -> None:
    work, first = await a_workspace(yard), await yard.first()
    for scopes, read_only, wanted in (
        (("sandbox:create",), True, 403),
        (("sandbox:create", "files:read"), True, 201),
        (("sandbox:create", "files:read"), False, 403),
        (("sandbox:create", "files:read", "files:write"), False, 201),
    ):
        async with yard.client_of(await yard.add_key(*first, scopes=scopes)) as client:
            body = {"mounts": [mount(work, readOnly=read_only)]}
            answer = await client.post(SANDBOXES, json=body)
            assert answer.status_code == wanted, (scopes, answer.text)


async def test_a_workspace_that_is_mounted_goes_only_by_force(yard: Yard) -> None:
    work, kept = await a_workspace(yard), await a_workspace(yard, "Kept")
    box = await yard.create(name="box", mounts=[mount(work), mount(kept, "/workspace/kept")])
    answer = await yard.client.delete(f"{WORKSPACES}/{work}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "WORKSPACE_IN_USE")
    assert "force=true" in answer.json()["error"]["message"]
    assert (await yard.client.get(f"{WORKSPACES}/{work}")).status_code == 200
    forced = await yard.client.delete(f"{WORKSPACES}/{work}", params={"force": "true"})
    assert forced.status_code == 200
    assert (await yard.client.get(f"{WORKSPACES}/{work}")).status_code == 404
    left = [mount(kept, "/workspace/kept", readOnly=False)]
    assert (await yard.get(box))["mounts"] == left
    if not hasattr(yard.house, "controls"):  # there the nodes' exports are not reached yet
        assert mounted_in(yard, box) == {"/workspace/kept": kept}
    # What is started from now on has it no more, and starts all the same.
    restarted = await yard.client.post(f"{SANDBOXES}/{box['id']}/restart")
    assert restarted.status_code == 200, restarted.text
    assert mounted_in(yard, box) == {"/workspace/kept": kept}


@pytest.mark.parametrize("yard", ["one"], indirect=True)
async def test_forks_and_snapshots_have_what_was_mounted(yard: Yard) -> None:
    work, more = await a_workspace(yard), await a_workspace(yard, "More")
    box = await yard.create(mounts=[mount(work), mount(more, "/workspace/more", readOnly=True)])
    made = await yard.client.post(f"{SANDBOXES}/{box['id']}/fork", json={"count": 1})
    fork = made.json()["data"][0]
    await eventually(lambda: _runs(yard, fork))
    assert (await yard.get(fork))["mounts"] == box["mounts"]
    assert mounted_in(yard, fork) == {"/workspace": work, "/workspace/more": more}
    saved = await yard.client.post(f"{SANDBOXES}/{box['id']}/snapshots", json={"name": "then"})
    assert saved.status_code == 201, saved.text
    await yard.client.delete(f"{WORKSPACES}/{more}", params={"force": "true"})
    again = await yard.create(snapshot="then")
    assert again["mounts"] == [mount(work, readOnly=False)]
    bare = await yard.create(snapshot="then", mounts=[])
    assert bare["mounts"] == []
    back = await yard.client.post(
        f"{SANDBOXES}/{box['id']}/rollback", json={"snapshotId": saved.json()["data"]["id"]}
    )
    assert back.status_code == 200, back.text
    assert (await yard.get(box))["mounts"] == [mount(work, readOnly=False)]
    assert mounted_in(yard, box)["/workspace"] == work


async def _runs(yard: Yard, box: Mapping[str, object]) -> bool:
    return (await yard.get(box))["status"] == "running"


@pytest.mark.parametrize("yard", ["one"], indirect=True)
async def test_what_machines_write_is_counted_and_charged_while_they_run(yard: Yard) -> None:
    work = await a_workspace(yard)
    box = await yard.create(mounts=[mount(work)])
    workspaces: Workspaces = yard.house.control.services.workspaces
    # As a machine would, which no request tells of.
    (yard.home / "workspaces" / work / "written").write_bytes(bytes(300_000))
    await workspaces.look_around()
    shown = (await yard.client.get(f"{WORKSPACES}/{work}")).json()["data"]
    assert shown["sizeBytes"] >= 300_000
    async with yard.house.store.read() as tx:
        assert await tx.sandboxes.mounted() == {work}
    assert (await yard.client.post(f"{SANDBOXES}/{box['id']}/pause")).status_code == 200
    async with yard.house.store.read() as tx:
        assert await tx.sandboxes.mounted() == frozenset()


async def test_a_member_is_not_told_of_others_sandboxes(yard: Yard) -> None:
    work, (org_id, _) = await a_workspace(yard), await yard.first()
    await yard.create(name="secret-plan", mounts=[mount(work)])
    member = await yard.add_member(org_id)
    async with yard.client_of(await yard.add_key(org_id, member)) as client:
        usage = (await client.get(f"{WORKSPACES}/{work}/usage")).json()["data"]
        assert (usage["inUse"], usage["counts"]["mountedSandboxes"]) == (True, 1)
        assert usage["mountedSandboxes"] == []
