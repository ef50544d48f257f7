"""What a node gives to another and takes from it: whole templates and versions, or nothing."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sandyard.server.app.doctor import contents
from sandyard.server.core.copies import CopiedFile, Copy, ReadCopy, WriteCopy
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
)
from sandyard.server.core.records import VersionAbout
from sandyard.server.core.shapes import Shape
from sandyard.server.node.images.copies import opened_copy
from sandyard.server.node.images.definitions import Definition, Source
from sandyard.server.node.images.image import ROOTS, sum_of, write_manifest
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.versions import Versions

SHAPE = Shape(1, 512, 1024)
ABOUT = VersionAbout("mine", "Alpine", "headless", SHAPE, {"A": "1"}, ready="true")
ROOT = bytes(1024) + b"\xe2\xe1\xf5\xe0" + b"root" + bytes(500_000) + b"end"


def node(folder: Path) -> Images:
    """Return the images of a node that knows the template `base`."""
    folder.mkdir(exist_ok=True)
    base = Definition(
        "base", "Base", "", "headless", SHAPE, (Source("", "", "X", (), "", ()),), (), None, (),
        None, (), digest="d",
    )  # fmt: skip
    return Images(
        definitions={"base": base},
        images_dir=folder / "images",
        templates_dir=folder / "templates",
        versions=Versions(folder / "versions"),
    )


def built(images: Images, digest: str = "one", *, has_sums: bool = True) -> str:
    """Have a node build its template, and return the digest."""
    folder = images.images_dir / digest
    folder.mkdir(parents=True)
    for name in (*ROOTS, "vmlinuz", "initrd"):
        (folder / name).write_bytes(f"{digest} {name}".encode() + bytes(300_000) + b"!")
    sums = {path.name: sum_of(path) for path in folder.iterdir()} if has_sums else None
    write_manifest(folder, os="X", size_bytes=1, inputs={"toolsRecipe": "3"}, sums=sums)
    images.use("base", digest)
    return digest


async def kept(images: Images, data: bytes = ROOT) -> str:
    """Have a node keep a version, and return its name."""

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return (await images.versions.keep(ABOUT, pieces(), size_max=2**20)).name


async def read(images: Images, name: str) -> tuple[Copy, bytes]:
    async with opened_copy(images, ReadCopy(name)) as opened:
        data = b""
        while piece := await opened.stream.read(70_000):
            data += piece
        return opened.answer, data


async def write(images: Images, copy: Copy, data: bytes) -> bool:
    """Write a copy, and tell whether it was wanted."""
    async with opened_copy(images, WriteCopy(copy)) as opened:
        if opened.answer.is_wanted:
            for start in range(0, len(data), 70_000):
                await opened.stream.write(data[start : start + 70_000])
            await opened.stream.write_eof()
            assert await opened.stream.read(1) == b""
        return bool(opened.answer.is_wanted)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


async def test_a_version_is_copied_once(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    name = await kept(here)
    copy, data = await read(here, name)
    assert (copy.name, copy.digest, copy.size_bytes) == (name, "", len(data))
    assert await write(there, copy, data)
    assert there.versions.names() == [name]
    versions = tmp_path / "there/versions"
    assert files_of(versions) == files_of(tmp_path / "here/versions")
    (root,) = versions.glob("*/root.erofs")
    assert root.stat().st_blocks * 512 < len(ROOT) / 2
    assert not await write(there, copy, data)


async def test_a_template_is_copied_once_and_replaced_by_a_newer_one(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    built(here)
    assert await write(there, *await read(here, "base"))
    assert files_of(there.images_dir / "one") == files_of(here.images_dir / "one")
    (fact,) = there.facts()
    assert (fact.status.value, fact.digest, fact.is_copy) == ("ready", "one", True)
    assert not here.facts()[0].is_copy
    assert not await write(there, *await read(here, "base"))
    built(here, "two")
    assert await write(there, *await read(here, "base"))
    assert there.facts()[0].digest == "two"
    # A copy of a copy is one as well.
    third = node(tmp_path / "third")
    assert await write(third, *await read(there, "base"))
    assert third.facts()[0].is_copy


async def test_copies_that_were_replaced_are_removed(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    needed = {"two"}

    def left() -> set[str]:
        return {one.name for one in there.images_dir.iterdir() if not one.name.startswith(".")}

    for digest in ("one", "two", "three"):
        built(here, digest)
        assert await write(there, *await read(here, "base"))
    now = datetime.now(UTC)
    there.drop_old(lambda: needed, now=now)
    assert left() == {"one", "two", "three"}, "what starts at this moment has one of them"
    later = now + timedelta(hours=1)
    there.drop_old(lambda: needed, now=later)
    assert left() == {"two", "three"}
    needed.clear()
    there.drop_old(lambda: needed, now=later)
    assert left() == {"three"}
    # What a node built itself stays: another version of Sandyard may use it.
    built(there, "own")
    built(there, "newer")
    there.drop_old(lambda: needed, now=later)
    assert left() == {"own", "newer"}


async def test_a_node_keeps_what_it_built_itself(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    built(here, "theirs")
    built(there, "own")
    with pytest.raises(ConflictError, match="has built its own"):
        await write(there, *await read(here, "base"))
    assert there.facts()[0].digest == "own"
    assert not (there.images_dir / "theirs").exists()


async def test_what_is_not_here_is_not_given(tmp_path: Path) -> None:
    here = node(tmp_path)
    for name in ("base", "other", "mine@0123456789abcdef01234567", "x@../../etc", "x@", "@"):
        with pytest.raises(NotFoundError):
            await read(here, name)
    with pytest.raises(NotFoundError, match="no such template"):
        await write(here, Copy("other", "d", (CopiedFile("manifest.json", 1),)), b"x")


@pytest.mark.parametrize("way", ["changed", "cut off", "of another name", "other settings"])
async def test_a_version_that_is_not_what_it_is_called_is_refused(tmp_path: Path, way: str) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    other = await kept(there, ROOT + b"of another")
    name = await kept(here)
    copy, data = await read(here, name)
    if way == "changed":
        data = data[:-1] + b"X"
    elif way == "cut off":
        data = data[:-1]
    elif way == "of another name":
        theirs, data = await read(there, other)
        copy = replace(theirs, name=name)
    else:
        data = data.replace(b'"true"', b'"evil"')
    with pytest.raises(DamagedError):
        await write(there, copy, data)
    # Neither is anything left of it, nor anything lost.
    assert there.versions.names() == [other]
    assert len(list((tmp_path / "there/versions").iterdir())) == 1


ODD: dict[str, dict[str, Any]] = {
    "a naive time": {"createdAt": "2026-01-01T00:00:00"},
    "no time": {"createdAt": "soon"},
    "inputs that are a list": {"inputs": ["a"]},
    "inputs that are numbers": {"inputs": {"kernel": 1}},
    "a size that is text": {"sizeBytes": "1"},
    "no system": {"os": None},
}


@pytest.mark.parametrize("way", ODD)
async def test_an_image_with_a_damaged_manifest_is_refused(tmp_path: Path, way: str) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    built(here)
    manifest = here.images_dir / "one/manifest.json"
    copy, data = await read(here, "base")
    told = json.dumps(json.loads(manifest.read_text()) | ODD[way]).encode()
    data = told + data[copy.files[0].size_bytes :]
    copy = replace(copy, files=(CopiedFile("manifest.json", len(told)), *copy.files[1:]))
    with pytest.raises(DamagedError):
        await write(there, copy, data)
    assert there.facts()[0].status.value == "pending"
    assert list(there.images_dir.iterdir()) == []


async def test_an_image_with_other_files_is_refused(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    built(here)
    copy, data = await read(here, "base")
    first, *rest = copy.files
    for files in (
        (replace(first, name="../../outside"), *rest),
        (replace(first, name="/etc/outside"), *rest),
        (first, first, *rest),
        (replace(first, name="boot.sh"), *rest),
    ):
        with pytest.raises(InvalidArgumentError):
            await write(there, replace(copy, files=files), data)
    for digest in ("", "../../x", "a/b", "A", "x" * 65):
        with pytest.raises(SandyardError):
            await write(there, replace(copy, digest=digest), data)
    without = data[: -copy.files[-1].size_bytes]
    with pytest.raises(DamagedError):
        await write(there, replace(copy, files=copy.files[:-1]), without)
    with pytest.raises(DamagedError, match="cut off"):
        await write(there, copy, data[:-1])
    assert [one.name for one in tmp_path.rglob("*outside*")] == []
    assert list(there.images_dir.iterdir()) == []


async def test_a_copy_whose_sender_leaves_is_nothing(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    built(here)
    copy, data = await read(here, "base")
    async with opened_copy(there, WriteCopy(copy)) as opened:
        await opened.stream.write(data[:100_000])
    assert list(there.images_dir.iterdir()) == []
    assert there.facts()[0].status.value == "pending"


# --- what is altered ------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


async def test_a_template_that_was_altered_does_not_spread(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    digest = built(here)
    assert [one.level for one in contents(here)] == ["ok"]
    flip(here.images_dir / digest / "root.erofs")
    copy, data = await read(here, "base")
    with pytest.raises(DamagedError, match=r"root\.erofs is not as it was built"):
        await write(there, copy, data)
    assert there.current("base") is None
    assert list(there.images_dir.iterdir()) == []
    (finding,) = contents(here)
    assert finding.level == "bad"
    assert "root.erofs" in finding.what
    assert "--again" in (finding.mend or "")


async def test_a_template_that_is_altered_on_its_way_is_refused(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    built(here)
    copy, data = await read(here, "base")
    altered = bytearray(data)
    altered[-1000] ^= 1
    with pytest.raises(DamagedError, match="not as it was built"):
        await write(there, copy, bytes(altered))


async def test_a_template_of_an_earlier_version_is_copied_as_it_is(tmp_path: Path) -> None:
    here, there = node(tmp_path / "here"), node(tmp_path / "there")
    built(here, has_sums=False)
    copy, data = await read(here, "base")
    assert await write(there, copy, data)
    (finding,) = contents(there)
    assert finding.level == "note"


async def test_a_version_that_was_altered_is_found(tmp_path: Path) -> None:
    here = node(tmp_path / "here")
    name = await kept(here)
    assert here.versions.altered() == []
    digest = name.partition("@")[2]
    flip(here.versions.folder / digest / "root.erofs")
    assert here.versions.altered() == [digest]
    (finding,) = contents(here)
    assert (finding.level, digest in finding.what) == ("bad", True)
