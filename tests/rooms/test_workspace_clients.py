"""Workspaces from the SDK and the command line."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pytest
from tests.support.door import Door, door
from tests.support.server import SANDYARD

from sandyard.client import (
    ApiError,
    AsyncSandyard,
    ConflictError,
    NotFoundError,
    Sandyard,
    TransferError,
)

T = TypeVar("T")
ODD = b"\xff\xfe odd"


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Door]:
    async with door(tmp_path / "home") as made:
        yield made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of this computer."""
    folder = tmp_path / "tree"
    (folder / "a b" / "empty").mkdir(parents=True)
    (folder / "a b" / "ü").write_bytes(os.urandom(2_500_000))
    (folder / ".hidden").write_text("hidden")
    (folder / "none").touch()
    with open(os.fsencode(folder) + b"/" + ODD, "wb"):
        pass
    return folder


def contents(folder: Path) -> dict[bytes, bytes | None]:
    return {
        os.fsencode(one.relative_to(folder)): None if one.is_dir() else one.read_bytes()
        for one in folder.rglob("*")
    }


async def concurrently(work: Callable[[], T]) -> T:
    """Do what blocks in a thread: the server is on this loop."""
    return await asyncio.to_thread(work)


async def test_a_workspace_from_threads(opened: Door, tree: Path, tmp_path: Path) -> None:
    def live() -> None:
        with Sandyard(opened.yard.key, f"http://127.0.0.1:{opened.port}") as yard:
            made = yard.create_workspace("Data", slug="data")
            assert {one.slug for one in yard.workspaces() if not one.is_personal} == {"data"}
            assert yard.workspace("data").id == made.id
            assert yard.rename_workspace("data", "Däta").name == "Däta"
            with pytest.raises(ConflictError):
                yard.create_workspace("Again", slug="data")
            files = yard.workspace_files("data")
            assert files.write("in/ä", "grüße").path == "/in/ä"
            assert files.read_text(PurePosixPath("/in/ä")) == "grüße"
            files.write(PurePosixPath("odd"), b"\xff")
            with pytest.raises(UnicodeDecodeError):
                files.read_text("odd")
            assert files.read_text("odd", errors="replace") == "\ufffd"
            files.remove(PurePosixPath("odd"))
            assert files.write("/in/many", iter([b"x"] * 3)).size == 3
            files.make_folder("to")
            assert files.move("/in/many", "/to").path == "/to/many"
            assert files.copy("/to", "/too").is_folder
            with pytest.raises(ApiError):
                files.move("/to/many", "/too/many")
            files.move("/to/many", "/too/many", overwrite=True)
            assert [one.name for one in files.list("/")] == ["in", "to", "too"]
            with pytest.raises(NotFoundError):
                files.read("/to/many")
            with pytest.raises(ApiError) as caught:
                files.remove("/in", "/nothing", "/to")
            assert caught.value.code == "not_found"
            assert [one.name for one in files.list()] == ["too"]
            seen: list[int] = []
            files.upload(tree, "/", on_progress=seen.append)
            assert sum(seen) == 2_500_006
            files.remove("/too")
            files.download("/", tmp_path / "back")
            assert contents(tmp_path / "back") == contents(tree)
            files.download("/a b/ü", tmp_path / "ü")
            assert (tmp_path / "ü").read_bytes() == (tree / "a b/ü").read_bytes()
            (tree / "away").symlink_to("/etc")
            with pytest.raises(TransferError):
                files.upload(tree, "/again")
            assert len(files.list("/again")) == 4
            # What is written here stays below where it was asked for.
            (tmp_path / "back" / "a b" / "empty").rmdir()
            (tmp_path / "back" / "a b" / "empty").symlink_to(tmp_path)
            with pytest.raises(TransferError):
                files.download("/", tmp_path / "back")
            # Names that are coded, and one that only reads so.
            files.write(os.fsdecode(ODD), b"odd")
            files.write("/base64:dmljdGlt", b"reads so")
            files.write("victim", b"victim")
            assert files.read("/base64:dmljdGlt") == b"reads so"
            assert files.move("/base64:dmljdGlt", "/moved").path == "/moved"
            assert files.read("victim") == b"victim"
            files.make_folder(os.fsdecode(b"f\xff"))
            files.write(os.fsdecode(b"f\xff/in"), b"in")
            (folder,) = [one for one in files.list() if one.name == os.fsdecode(b"f\xff")]
            assert files.list(folder.path)[0].size == 2
            # Links are left out and told of, wherever they lead; all else comes.
            place = opened.yard.home / "workspaces" / made.id
            (place / "loop").symlink_to(".")
            (place / "away").symlink_to("/etc/passwd")
            os.mkfifo(place / "fifo")
            with pytest.raises(TransferError, match="3 were left out"):
                files.download("/", tmp_path / "third")
            assert (tmp_path / "third/victim").read_bytes() == b"victim"
            assert not os.path.lexists(tmp_path / "third/away")
            yard.delete_workspace("data")
            with pytest.raises(NotFoundError):
                files.list()

    await concurrently(live)


async def test_a_workspace_on_a_loop(opened: Door, tree: Path, tmp_path: Path) -> None:
    async with AsyncSandyard(opened.yard.key, f"http://127.0.0.1:{opened.port}") as yard:
        made = await yard.create_workspace("Data")
        assert made in await yard.workspaces()
        files = yard.workspace_files((await yard.workspace(made.slug)).id)
        assert (await files.write("f", b"x" * 1000)).size == 1000
        assert await files.read_text("f") == "x" * 1000
        await files.make_folder("d")
        assert (await files.copy("f", "d")).path == "/d/f"
        assert (await files.move("f", "g")).path == "/g"
        await files.upload(tree, "/tree")
        await files.download("/tree", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(tree)
        await files.remove("d", "g")
        assert [one.name for one in await files.list()] == ["tree"]
        assert (await yard.rename_workspace(made.id, "New")).name == "New"
        await yard.delete_workspace(made.id)


async def test_a_workspace_from_the_command_line(opened: Door, tree: Path, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "SANDYARD_URL": f"http://127.0.0.1:{opened.port}",
        "SANDYARD_API_KEY": opened.yard.key,
        "XDG_CONFIG_HOME": str(tmp_path / "xdg"),
    }

    def sandyard(*words: str | bytes | Path, status: int = 0) -> str:
        done = subprocess.run(
            [SANDYARD, *words], env=env, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == status, (words, done.stderr)
        return (done.stdout + done.stderr).decode(errors="surrogateescape")

    def live() -> None:
        made = json.loads(sandyard("workspace", "create", "Data", "--slug", "data", "--json"))
        assert made["id"] in sandyard("workspace", "list")
        assert "New" in sandyard("workspace", "rename", "data", "New")
        sandyard("cp", tree, "@data:/")
        assert sandyard("workspace", "ls", "data").splitlines()[1].startswith("tree/\t")
        listed = json.loads(sandyard("workspace", "ls", "data", "/tree", "--json"))
        assert len(listed) == 4
        sandyard("cp", "@data:/tree", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(tree)
        # All of it, out and in again.
        sandyard("workspace", "rm", "data", "/tree/a b")
        assert "it is /moved" in sandyard("workspace", "mv", "data", "/tree", "/moved")
        sandyard("cp", "@data:", tmp_path / "backup")
        sandyard("workspace", "rm", "data", "/moved")
        sandyard("cp", f"{tmp_path / 'backup'}/.", "@data:")
        sandyard("cp", "@data:/", tmp_path / "second")
        assert contents(tmp_path / "second") == contents(tmp_path / "backup")
        assert b"moved/.hidden" in contents(tmp_path / "second")
        # One file: into a folder, to a name, over one that is there, and back.
        file = tmp_path / "file"
        for number, target in enumerate(
            ("@data:/moved", "@data:/moved/", "@data:/new", "@data:/new")
        ):
            file.write_text(str(number))
            sandyard("cp", file, target)
        sandyard("cp", "@data:/new", file)
        assert file.read_text() == "3"
        sandyard("cp", "@data:/moved/file", tmp_path / "second")
        assert (tmp_path / "second/file").read_text() == "1"
        assert "cannot find" in sandyard("cp", "@data:/none", file, status=1)
        assert "cannot find the workspace" in sandyard("cp", "@none:/x", file, status=1)
        sandyard("cp", file, tmp_path / "x", status=2)
        assert "deleted data" in sandyard("workspace", "delete", "data")
        sandyard("workspace", "delete", "data", status=1)

    await concurrently(live)
