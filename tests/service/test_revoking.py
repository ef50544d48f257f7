"""Keys that were revoked go from the files of sandboxes; in real guests see
tests/machine/test_ssh.py."""

import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.desk import Desk, open_desk
from tests.support.nodes import TunnelTo

from sandyard.server.core import ops
from sandyard.server.core.errors import NotFoundError, UnavailableError
from sandyard.server.core.records import SshKey
from sandyard.server.core.states import Status
from sandyard.server.service.reconcile import revoking
from sandyard.server.service.sandboxes.create import NewSandbox

BLOB = "AAAAC3NzaC1lZDI1NTE5AAAAIJWM2N5s4Fv4mCaEiv1NMXSFnGL3UBAoyzrlQ5XA3X0i"
KEPT = "AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path) as made:
        yield made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is executed to remove keys: in which sandbox, and which command."""
    done: list[tuple[str, str]] = []
    real = TunnelTo.open

    def open_(self: TunnelTo, ref: Any, operation: Any) -> Any:
        if isinstance(operation, ops.Execute) and "authorized_keys" in operation.command:
            done.append((ref.sandbox_id, operation.command))
        return real(self, ref, operation)

    monkeypatch.setattr(TunnelTo, "open", open_)
    return done


async def _key(desk: Desk, blob: str = BLOB) -> SshKey:
    return await desk.services.ssh_keys.add(desk.actor, "laptop", f"ssh-ed25519 {blob} me")


async def test_a_deleted_key_goes_from_who_runs_and_from_others_at_their_resume(
    desk: Desk, told: list[tuple[str, str]]
) -> None:
    key, other = await _key(desk), await _key(desk, KEPT)
    up, down, without = (
        await desk.create(ssh_keys=None),
        await desk.create(ssh_keys=None),
        await desk.create(ssh_keys=[other.id]),
    )
    await desk.services.sandboxes.pause(desk.actor, down.id)
    await desk.services.ssh_keys.delete(desk.actor, key.id)
    await desk.drive(6)
    ((where, command),) = told
    assert where == up.id
    assert BLOB in command
    assert KEPT not in command
    assert without.id != where
    for box in (up, down):
        assert (await desk.get(box)).ssh_key_ids == (other.id,)
        assert len((await desk.get(box)).authorized_keys) == 1
    told.clear()
    await desk.services.sandboxes.resume(desk.actor, down.id)
    await desk.drive(6)
    assert [one for one, _ in told] == [down.id]
    # It is added again, and deleted while one rests that had it before: that one has lost it, too.
    told.clear()
    await desk.services.sandboxes.pause(desk.actor, down.id)
    await desk.services.ssh_keys.delete(desk.actor, (await _key(desk)).id)
    await desk.services.sandboxes.resume(desk.actor, down.id)
    await desk.drive(6)
    assert [one for one, _ in told] == [down.id]


async def test_a_key_that_is_deleted_while_a_sandbox_is_made_does_not_come_to_be_in_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await _key(desk)
    placement = desk.services.creation._placement
    real = placement.choose

    async def choose(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(NotFoundError):
            await desk.services.ssh_keys.delete(desk.actor, key.id)
        return await real(*args, **kwargs)

    monkeypatch.setattr(placement, "choose", choose)
    box = await desk.create(ssh_keys=None)
    assert (box.authorized_keys, box.ssh_key_ids) == ((), ())


async def test_a_guest_that_does_not_answer_is_asked_again_and_holds_up_nobody(
    desk: Desk, told: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await _key(desk)
    boxes = [await desk.create(ssh_keys=None) for _ in range(2)]
    real = TunnelTo.open

    def open_(self: TunnelTo, ref: Any, operation: Any) -> Any:
        if ref.sandbox_id == boxes[0].id and isinstance(operation, ops.Execute):
            told.append((ref.sandbox_id, operation.command))
            raise UnavailableError("the agent is silent")
        return real(self, ref, operation)

    monkeypatch.setattr(TunnelTo, "open", open_)
    await desk.services.ssh_keys.delete(desk.actor, key.id)
    await desk.drive(30)
    assert sorted(one for one, _ in told) == sorted(one.id for one in boxes)
    await desk.drive(60)
    assert len(told) == 3
    monkeypatch.setattr(TunnelTo, "open", real)
    await desk.drive(130)
    async with desk.control.store.read() as tx:
        assert await tx.revoked_keys.pending() == []
    assert (await desk.get(boxes[0])).status is Status.RUNNING


async def test_a_key_that_was_given_itself_stays_where_its_twin_is_deleted(
    desk: Desk, told: list[tuple[str, str]]
) -> None:
    key = await _key(desk)
    literal = f"ssh-ed25519 {BLOB} another comment"
    wish = NewSandbox("base-minimal", ssh_keys=[key.id, literal])
    box = await desk.services.creation.create(desk.actor, wish)
    await desk.until(box, Status.RUNNING)
    await desk.services.ssh_keys.delete(desk.actor, key.id)
    await desk.drive(6)
    assert told == []
    assert (await desk.get(box)).authorized_keys == (literal,)


@pytest.mark.parametrize("kind", ["file", "nothing", "link", "folder", "other's"])
def test_the_script_takes_out_those_lines_and_leaves_the_rest(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "authorized_keys"
    lines = [
        "# mine", f"ssh-ed25519 {BLOB} me", f'command="ls" ssh-ed25519 {BLOB}',
        f"ssh-ed25519 {KEPT} you", "",
    ]  # fmt: skip
    before = "\n".join(lines)
    kept = f"# mine\nssh-ed25519 {KEPT} you\n"
    if kind == "file":
        file.write_text(before)
        file.chmod(0o640)
    elif kind == "other's":  # nothing is left of it
        file.write_text(f"ssh-ed25519 {BLOB} me\n")
        kept = ""
    elif kind == "link":
        (tmp_path / "target").write_text(before)
        file.symlink_to("target")
    elif kind == "folder":
        file.mkdir()
    script = revoking._SCRIPT.format(keys=f"-e {BLOB}").replace("/root/.ssh", str(tmp_path))
    subprocess.run(["sh", "-c", script], check=True, capture_output=True)
    if kind in ("file", "other's"):
        assert file.read_text() == kept
    if kind == "file":
        assert file.stat().st_mode & 0o777 == 0o640
    if kind == "link":
        assert (tmp_path / "target").read_text() == before
    assert {one.name for one in tmp_path.iterdir()} <= {"authorized_keys", "target"}
