"""Files of machines and workspaces in backups."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.house import Yard, open_yard, settings_of

from sandyard.server.app import backup_files
from sandyard.server.app.backup_files import Include
from sandyard.server.app.backups import About, backup, compare, restore
from sandyard.server.core.errors import ConflictError, UnavailableError, UnsupportedError
from sandyard.server.core.records import VersionAbout
from sandyard.server.core.shapes import Shape
from sandyard.server.links.volumes import ImageVolumes
from sandyard.server.node.images.versions import Versions

WORD = "correct horse"
SECTIONS = {"workspaces": {"volumes": "folders"}}


async def a_workspace(yard: Yard, name: str) -> Path:
    made = await yard.client.post("/v1/workspaces", json={"name": name})
    place = yard.home / "workspaces" / str(made.json()["data"]["id"])
    answer = await yard.client.post(
        f"/v1/workspaces/{place.name}/upload", files={"file": ("kept", b"kept")}
    )
    answer.raise_for_status()
    return place


def fill(place: Path) -> None:
    """Fill a workspace with what is easily lost."""
    (place / "sub").mkdir(mode=0o2770)
    os.link(place / "kept", place / "sub" / "again")
    (place / "out").symlink_to("/etc/passwd")
    (place / "dangling").symlink_to("nowhere")
    (place / "a\nb\\c").write_text("newline")
    (Path(os.fsdecode(bytes(place) + b"/\xff\xfe"))).write_bytes(b"not UTF-8")
    (place / "-rf").write_text("an option?")
    with (place / "holes").open("wb") as file:
        file.truncate(2**34)
        file.seek(2**33)
        file.write(b"in the middle")
    os.setxattr(place / "kept", "user.note", b"kept too")
    os.chown(place / "kept", 4321, 1234)
    (place / "kept").chmod(0o640)
    os.utime(place / "kept", ns=(1, 1_234_567_890_123_456_789))


async def a_version(home: Path) -> str:
    """Keep a version of a template, and return its name."""

    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(100_000)

    about = VersionAbout("mine", "Linux", "headless", Shape(1, 512, 1024))
    kept = await Versions(home / "versions").keep(about, pieces(), size_max=2**20)
    return kept.name


def seen_of(place: Path) -> dict[bytes, object]:
    found = dict[bytes, object]()
    for path in place.rglob("*"):
        look = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file() and look.st_size < 2**20:
            content = path.read_bytes(), os.listxattr(path)
        found[os.fsencode(path.relative_to(place))] = (
            look.st_mode, look.st_uid, look.st_gid, look.st_nlink, look.st_size, content,
            None if path.is_dir() else look.st_mtime_ns,
        )  # fmt: skip
    return found


async def back_up(yard: Yard, file: Path, *include: Include) -> tuple[About, list[str]]:
    said = list[str]()
    about = await asyncio.to_thread(
        backup, settings_of(yard.home, sections=SECTIONS), file, WORD,
        include=include, progress=said.append,
    )  # fmt: skip
    return about, said


@pytest.mark.root
async def test_paused_machines_snapshots_and_workspaces_come_back_to_an_empty_home(
    tmp_path: Path,
) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    settings = settings_of(home, sections=SECTIONS)
    async with open_yard(home, keep=True, pool=1, sections=SECTIONS) as yard:
        paused, runs = await yard.create(name="paused"), await yard.create(name="runs")
        made = await yard.act(runs, "snapshots", name="s")
        await yard.act(paused, "pause")
        place = await a_workspace(yard, "Work")
        fill(place)
        before = seen_of(place)
        version = await a_version(home)
        about, said = await back_up(yard, file, *Include)
        assert about.include == ("paused", "snapshots", "templates", "workspaces")
        assert "copying 1 versions of templates" in said
        assert f"leaving out {runs['id']}: it is not paused" in said
        await yard.act(runs, "pause")
        assert compare(settings, file, WORD)[1] == []
    shutil.rmtree(home)
    absent = [one.what for one in (await asyncio.to_thread(compare, settings, file, WORD))[1]]
    assert f"workspaces/{place.name}" in absent
    assert {one.partition("/")[0] for one in absent if one.count("/") == 1} >= {
        "machines", "snapshots", "images", "workspaces",
    }  # fmt: skip
    assert not home.exists()
    await asyncio.to_thread(restore, settings, file, WORD)
    assert seen_of(place) == before
    assert Versions(home / "versions").names() == [version]
    assert [oct(one.stat().st_mode) for one in (home / "versions").glob("*/*")] == [
        "0o100600", "0o100444",
    ]  # fmt: skip
    assert (home / "versions").stat().st_mode & 0o777 == 0o711
    assert (place / "holes").stat().st_blocks * 512 < 2**20
    assert not [one for one in home.iterdir() if one.name.startswith(".")]
    assert not [one for one in (home / "images").iterdir() if one.name.startswith(".")]
    async with open_yard(home, saves=True, sections=SECTIONS) as yard:
        assert (await yard.act(paused, "resume"))["status"] == "running"
        again = await yard.create(snapshot=made["id"], name="new")
        assert again["status"] == "running", again
        # Its machine was not in the backup.
        async with asyncio.timeout(20):
            while (await yard.get(runs))["status"] not in ("error", "orphaned"):
                await asyncio.sleep(0.05)


@pytest.mark.root
async def test_what_is_there_is_newer_and_stays(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    settings = settings_of(home, sections=SECTIONS)
    async with open_yard(home, keep=True, saves=True, sections=SECTIONS) as yard:
        box = await yard.create(name="paused")
        await yard.act(box, "pause")
        place, other = await a_workspace(yard, "Work"), await a_workspace(yard, "Other")
        await back_up(yard, file, *Include)
        (place / "kept").write_text("newer")
        shutil.rmtree(other)
    (machine,) = (home / "machines").iterdir()
    (machine / "newer").touch()
    said = list[str]()
    # As a restore that was killed leaves it.
    other.mkdir()
    (other / "half").touch()
    other.with_name(f"{other.name}.restoring").touch()
    await asyncio.to_thread(restore, settings, file, WORD, progress=said.append)
    assert f"leaving machines/{machine.name}: it is there" in said
    assert f"leaving the workspace {place.name}: it is there" in said
    assert (machine / "newer").exists()
    assert (place / "kept").read_text() == "newer"
    assert [one.name for one in other.iterdir()] == ["kept"]
    assert not other.with_name(f"{other.name}.restoring").exists()
    # A sandbox has one machine, whatever its name.
    machine.rename(machine.with_name("m" + machine.name[1:][::-1]))
    said.clear()
    await asyncio.to_thread(restore, settings, file, WORD, progress=said.append)
    assert f"leaving machines/{machine.name}: it is there" in said


@pytest.mark.root
async def test_a_workspace_whose_image_was_moved_away_is_restored_once_it_is_unmounted(
    tmp_path: Path,
) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    sections = {"workspaces": {"volumes": "images"}}
    settings = settings_of(home, sections=sections)
    async with open_yard(home, keep=True, sections=sections) as yard:
        workspace = (await a_workspace(yard, "Work")).name
        about = await asyncio.to_thread(backup, settings, file, WORD, include=Include)
        assert "workspaces" in about.include
        newest = (await a_workspace(yard, "Newer")).name
    folder = settings.workspaces_dir
    volumes = ImageVolumes(folder)
    async with volumes.open(workspace, 2**30) as place:
        assert place.is_mount()
        for name in (f"{workspace}.ext4", f"{workspace}.base"):
            if (folder / name).exists():
                (folder / name).rename(tmp_path / name)
        with pytest.raises(ConflictError, match=r"moved away while it is mounted.*umount"):
            await asyncio.to_thread(restore, settings, file, WORD)
        subprocess.run(["umount", place], check=True)
    said = list[str]()
    await asyncio.to_thread(restore, settings, file, WORD, progress=said.append)
    assert f"putting the workspace {workspace} back" in said
    assert any(one.startswith(f"the workspace {newest} is newer") for one in said)
    async with volumes.open(workspace, 2**30) as place:
        assert (place / "kept").read_text() == "kept"
    await volumes.close()


@pytest.mark.root
async def test_a_machine_that_is_used_during_the_copy_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    settings = settings_of(home, sections=SECTIONS)
    real, looks = backup_files._write_archive, list[int]()
    async with open_yard(home, keep=True, saves=True, sections=SECTIONS) as yard:
        stays, goes = await yard.create(name="stays"), await yard.create(name="goes")
        for box in (stays, goes):
            await yard.act(box, "pause")
        of = {
            one.name: (one / "resident.json").read_text() for one in (home / "machines").iterdir()
        }
        (left,) = (name for name, text in of.items() if str(goes["id"]) in text)
        (kept,) = of.keys() - {left}
        loop = asyncio.get_running_loop()

        def using(root: Path, *others: object) -> object:
            if root == home and not looks:
                looks.append(1)
                path = f"/v1/sandboxes/{goes['id']}"
                asyncio.run_coroutine_threadsafe(yard.client.delete(path), loop).result(30)
            return real(root, *others)  # type: ignore[arg-type]

        monkeypatch.setattr(backup_files, "_write_archive", using)
        _, said = await back_up(yard, file, Include.PAUSED)
    assert f"leaving out machines/{left}: it was used meanwhile" in said
    shutil.rmtree(home)
    await asyncio.to_thread(restore, settings, file, WORD)
    assert [one.name for one in (home / "machines").iterdir()] == [kept]


@pytest.mark.root
async def test_what_cannot_be_copied_or_unpacked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    settings = settings_of(home, sections=SECTIONS)
    async with open_yard(home, keep=True, saves=True, sections=SECTIONS) as yard:
        place = await a_workspace(yard, "Work")
        await yard.act(await yard.create(), "pause")
        several = settings.model_copy(
            update={"cluster": settings.cluster.model_copy(update={"nats": ("nats://x",)})}
        )
        with pytest.raises(UnsupportedError, match="on the nodes"):
            backup(several, file, WORD, include=[Include.WORKSPACES])
        with monkeypatch.context() as patched:
            broken = (*backup_files._TAR, "--no-such-option")
            patched.setattr(backup_files, "_TAR", broken)
            with pytest.raises(UnavailableError, match="no-such-option"):
                await back_up(yard, file, Include.PAUSED)
            assert list(tmp_path.iterdir()) == [home]
            # One workspace does not fail the backup of everything else.
            _, said = await back_up(yard, tmp_path / "c", Include.WORKSPACES)
            assert any("leaving out" in one and "no-such-option" in one for one in said)
        await back_up(yard, file, Include.WORKSPACES)
        shutil.rmtree(place)
        assert not any(one.name.endswith(".part") for one in tmp_path.iterdir())
    monkeypatch.setattr(backup_files, "_TAR", broken)
    before = {one.name for one in home.iterdir()} | {"server.lock"}
    with pytest.raises(UnavailableError, match="cannot unpack"):
        await asyncio.to_thread(restore, settings, file, WORD)
    assert {one.name for one in home.iterdir()} == before
    assert not place.exists()


@pytest.mark.root
async def test_a_tar_that_is_killed_makes_no_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file, dying = tmp_path / "home", tmp_path / "b", tmp_path / "dying"
    dying.write_text("#!/bin/sh\nhead -c 100000 /dev/zero\nkill -9 $$\n")
    dying.chmod(0o755)
    async with open_yard(home, keep=True, saves=True, sections=SECTIONS) as yard:
        await a_workspace(yard, "Work")
        box = await yard.create()
        await yard.act(box, "pause")
        monkeypatch.setattr(backup_files, "_TAR", (str(dying),))
        with pytest.raises(UnavailableError, match="tar ended with -9"):
            await back_up(yard, file, Include.PAUSED)
        assert not file.exists()
        _, said = await back_up(yard, file, Include.WORKSPACES)
        assert any("tar ended with -9" in one for one in said)


@pytest.mark.root
async def test_what_one_tenant_makes_of_their_files_keeps_nobody_elses(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    settings = settings_of(home, sections=SECTIONS)
    async with open_yard(home, keep=True, saves=True, sections=SECTIONS) as yard:
        hostile, other = await a_workspace(yard, "Hostile"), await a_workspace(yard, "Other")
        for name, levels in (("d" * 200, 30), ("a", 1500)):  # a long path, and a deep one
            place = os.open(hostile, os.O_RDONLY)
            for _ in range(levels):
                os.mkdir(name, dir_fd=place)
                below = os.open(name, os.O_RDONLY, dir_fd=place)
                os.close(place)
                place = below
            os.close(place)
        await back_up(yard, file, Include.WORKSPACES)
    backup_files.remove_tree(home)
    said = list[str]()
    await asyncio.to_thread(restore, settings, file, WORD, progress=said.append)
    assert any(f"a part of the workspace {hostile.name} is lost" in one for one in said)
    assert (hostile / "kept").read_bytes() == (other / "kept").read_bytes() == b"kept"
    assert not [one for one in home.iterdir() if one.name.startswith(".")]
    backup_files.remove_tree(hostile)


@pytest.mark.root
async def test_a_workspace_that_was_restored_in_part_is_not_replaced_once_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    settings = settings_of(home, sections=SECTIONS)
    async with open_yard(home, keep=True, saves=True, sections=SECTIONS) as yard:
        place = await a_workspace(yard, "Work")
        await back_up(yard, file, Include.WORKSPACES)
    begun = place.with_name(f"{place.name}.restoring")
    begun.touch()  # killed
    async with open_yard(home, keep=True, saves=True, sections=SECTIONS) as yard:
        assert "was killed" in caplog.text
        (place / "newer").touch()
        _, said = await back_up(yard, tmp_path / "c", Include.WORKSPACES)
        assert "copying 1 workspaces" in said
    await asyncio.to_thread(restore, settings, file, WORD)
    assert (place / "newer").exists()
    # One that fails leaves nothing half done.
    shutil.rmtree(place)

    def failing(*_: object) -> str:
        raise UnavailableError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(backup_files, "_copy_tree", failing)
        with pytest.raises(UnavailableError, match="disk is gone"):
            await asyncio.to_thread(restore, settings, file, WORD)
    assert list(place.parent.iterdir()) == []
    await asyncio.to_thread(restore, settings, file, WORD)
    assert (place / "kept").exists()


async def test_several_hosts_cannot_include_what_is_on_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="installation on one machine"):
        settings_of(
            tmp_path,
            sections={"backup": {"include": ["paused"]}, "cluster": {"nats": ["tls://x:4222"]}},
        )
