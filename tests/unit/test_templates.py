"""Templates of one's own: what is requested, what images say, and versions on disk."""

import io
import json
import tarfile
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from sandyard.cli.template import with_secrets
from sandyard.client import Template
from sandyard.client.templates import pack_context
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.records import VersionAbout
from sandyard.server.core.shapes import Shape
from sandyard.server.node.images.image import ROOTS, read_image, write_manifest
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.versions import Versions
from sandyard.server.service.actor import Actor
from sandyard.server.service.builds.builds import read, written
from sandyard.server.service.builds.cache import layers_prefix, step_names
from sandyard.server.service.builds.config import os_of, read_config
from sandyard.server.service.builds.credentials import host_of
from sandyard.server.service.builds.output import Lines, Masks
from sandyard.server.service.builds.plan import NewFile, NewTemplate, check_plan
from sandyard.server.service.builds.sources import pinned

SHAPE = Shape(1, 512, 5120)


MEMBER = Actor(org_id="o", user_id="u", role="member", scopes=frozenset(), kind="api_key")


# --- what is requested ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        "alpine", "alpine:3.22", "docker.io/library/alpine", "localhost:5000/a/b_c.d--e:v1.2-x",
        f"ghcr.io/a/b@sha256:{'0' * 64}", f"a:b@sha256:{'f' * 64}",
    ],
)  # fmt: skip
def test_references_of_images_are_taken(image: str) -> None:
    check_plan(NewTemplate("a", image=image))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"slug": "No"}, "slug"), ({"slug": "a" * 64}, "slug"), ({"base": None}, "base"),
        ({"image": "alpine"}, "image"), ({"context": "x"}, "context"), ({"run": ("",)}, "run"),
        ({"base": None, "image": "--help"}, "image"), ({"base": None, "image": "a b"}, "image"),
        ({"base": None, "image": "http://x/y"}, "image"), ({"base": None, "image": "A"}, "image"),
        ({"base": None, "image": "a@sha256:12"}, "image"), ({"apt": ("-o", "x")}, "apt"),
        ({"apt": ("a b",)}, "apt"), ({"pip": ("--index-url=x",)}, "pip"), ({"npm": ("",)}, "npm"),
        ({"pip": ("a\0",)}, "pip"), ({"env": {"1": "x"}}, "env"), ({"start": " "}, "start"),
        ({"files": (NewFile("a", b""),)}, "files"), ({"files": (NewFile("/a/", b""),)}, "files"),
        ({"files": (NewFile("/a/../b", b""),)}, "files"), ({"workdir": "x"}, "workdir"),
        ({"files": (NewFile("/a", b"x" * 2**20), NewFile("/b", b"x"))}, "files"),
        ({"files": (NewFile("/a", b"", 0o10000),)}, "files"), ({"ready": "\0"}, "ready"),
        ({"default_user": ""}, "default_user"), ({"name": "x" * 101}, "name"),
        ({"run": ("x\ud800",)}, "run"), ({"run": ("x",) * 201}, "run"),
        ({"base": None, "dockerfile": "x" * (2**20 + 1)}, "dockerfile"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_plan(replace(NewTemplate("a", base="b"), **changes))
    assert caught.value.facts["field"] == field


TEXTS = st.text(max_size=20)


@given(
    st.builds(
        NewTemplate,
        slug=TEXTS, name=st.none() | TEXTS, base=st.none() | TEXTS,
        run=st.lists(TEXTS).map(tuple), env=st.dictionaries(TEXTS, TEXTS),
        files=st.lists(st.builds(NewFile, TEXTS, st.binary(), st.integers(0, 4095))).map(tuple),
    )
)  # fmt: skip
def test_a_request_is_kept_whole(wish: NewTemplate) -> None:
    kept = json.loads(json.dumps(written(wish) | {"shape": vars(SHAPE)}))
    assert read(kept) == (wish, SHAPE)


def test_a_digest_takes_the_place_of_a_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    assert pinned("a/b:c") == "a/b:c"
    assert pinned(f"host:5000/a/b:c@{digest}") == f"host:5000/a/b@{digest}"
    assert pinned(f"host:5000/a/b@{digest}") == f"host:5000/a/b@{digest}"


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("alpine", "docker.io"), ("library/alpine", "docker.io"), ("docker.io/a/b", "docker.io"),
        ("index.docker.io/a/b", "docker.io"), ("ghcr.io/a/b:c", "ghcr.io"),
        ("localhost/a", "localhost"), ("host:5000/a", "host:5000"), ("a/b/c", "docker.io"),
    ],
)  # fmt: skip
def test_the_registry_of_an_image(image: str, host: str) -> None:
    assert host_of(image) == host


# --- what an image says of itself -----------------------------------------------------------------


def config(**given: object) -> bytes:
    return json.dumps({"architecture": "amd64", "config": given}).encode()


def test_an_images_own_settings_are_read() -> None:
    found = read_config(
        config(
            Entrypoint=["/run me"], Cmd=["a", "b"], Env=["A=1=2", "B=", "no-name=x", "=y"],
            WorkingDir="/srv", User="me:us", Volumes={"/a": {}},
            Healthcheck={"Test": ["CMD", "curl", "a b"]},
        )
    )  # fmt: skip
    assert found.command == ("/run me", "a", "b")
    assert (found.env, found.user, found.workdir) == ({"A": "1=2", "B": ""}, "me:us", "/srv")
    assert found.check == "curl 'a b'"
    assert [one.partition(":")[0] for one in found.ignored] == ["VOLUME"]
    by_buildah = json.dumps({"Docker": {"config": {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}}}})
    assert read_config(by_buildah.encode()).check == "x"
    assert read_config(config(Healthcheck={"Test": ["NONE"]})).check is None
    assert read_config(b"{}").command == ()
    with pytest.raises(InvalidArgumentError, match=r"linux/arm64, and sandboxes need linux/amd64"):
        read_config(b'{"os": "linux", "architecture": "arm64"}')


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"no", b'{"config": 1}', config(Env="x"), config(Cmd="x"), config(User=1),
        config(Cmd=["x"] * 2000), config(Env=["A=" + "x" * 70_000]), b"[" * 100_000,
        config(User="\0"), config(WorkingDir="x" * 5000), config(Cmd=["\ud800"]),
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        read_config(data)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda one: (
    st.lists(one, max_size=4) | st.dictionaries(
        st.sampled_from(["config", "Env", "Cmd", "User", "Test", "Healthcheck", "Docker"]), one
    )
), max_leaves=20))  # fmt: skip
def test_whatever_an_image_says_is_read_or_refused(told: object) -> None:
    with suppress(InvalidArgumentError):
        read_config(json.dumps(told).encode())


def test_an_operating_system_has_a_name() -> None:
    assert os_of(b'ID=x\nPRETTY_NAME="Alpine Linux v3.22"\n') == "Alpine Linux v3.22"
    assert os_of(b"") == os_of(b"PRETTY_NAME=\n") == "Linux"
    assert os_of(b"PRETTY_NAME=\xff\x1b[2J" + b"x" * 200).isprintable()


# --- the log --------------------------------------------------------------------------------------


def test_output_becomes_lines_that_move_no_cursor() -> None:
    lines = Lines()
    assert lines.feed(b"on") == []
    assert lines.feed(b"e\ntwo\r10 %\r\n\n\x1b[31mred\x1b[0m\x1b]0;title\x07!\nla") == [
        "one", "two", "10 %", "red!",
    ]  # fmt: skip
    assert lines.end() == ["la"]
    assert lines.end() == []
    assert len(lines.feed(b"x" * 10_000)) == 1


@given(st.binary())
def test_lines_are_plain_whatever_is_printed(data: bytes) -> None:
    lines = Lines()
    for one in (*lines.feed(data), *lines.end()):
        assert "\n" not in one
        assert "\x1b" not in one


# --- what the client sends ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ("", ["a.log", "deep/a.log", "deep/er/b.txt", "keep/k.log"]),
        ("*.log", ["deep/a.log", "deep/er/b.txt", "keep/k.log"]),
        ("**/*.log", ["deep/er/b.txt"]),
        ("deep", ["a.log", "keep/k.log"]),
        ("/deep/\n# a comment\n\n", ["a.log", "keep/k.log"]),
        ("deep/*", ["a.log", "keep/k.log"]),
        ("deep\n!deep/er", ["a.log", "deep/er/b.txt", "keep/k.log"]),
        ("**\n!keep", ["keep/k.log"]),
        ("?.log", ["deep/a.log", "deep/er/b.txt", "keep/k.log"]),
        ("[a-c].log", ["deep/a.log", "deep/er/b.txt", "keep/k.log"]),
        ("**/er", ["a.log", "deep/a.log", "keep/k.log"]),
    ],
)
def test_a_context_is_sent_without_what_is_ignored(
    tmp_path: Path, rules: str, left: list[str]
) -> None:
    for name in ("a.log", "deep/a.log", "deep/er/b.txt", "keep/k.log"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / ".dockerignore").write_text(f"{rules}\n.dockerignore\n")
    packed = io.BytesIO()
    pack_context(tmp_path, packed)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        assert [one.name for one in archive if one.isfile()] == left


def test_a_link_out_of_the_context_is_sent_as_a_link(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "in"
    outside.mkdir()
    (outside / "secret").write_text("of another")
    inside.mkdir()
    (inside / "folder").symlink_to(outside)
    (inside / "file").symlink_to(outside / "secret")
    packed = io.BytesIO()
    pack_context(inside, packed)
    assert b"of another" not in packed.getvalue()
    packed.seek(0)
    with tarfile.open(fileobj=packed) as archive:
        assert {one.name: one.issym() for one in archive} == {"file": True, "folder": True}


def test_a_template_is_described_step_by_step() -> None:
    base = Template("mine").from_template("base-minimal").apt("a").apt("b", "c").env(X="1")
    whole = base.env(Y="2").file("/f", "x", mode="755").run("one", "two").start("go", ready="ok")
    assert base.body({}) == {
        "slug": "mine", "base": "base-minimal", "apt": ["a", "b", "c"], "env": {"X": "1"},
    }  # fmt: skip
    assert whole.user("me").shape(memory="1GB").from_image("alpine").body({"upload": "u"}) == {
        "slug": "mine", "image": "alpine", "apt": ["a", "b", "c"], "env": {"X": "1", "Y": "2"},
        "files": [{"path": "/f", "contents": "x", "mode": "755"}], "run": ["one", "two"],
        "start": "go", "ready": "ok", "defaultUser": "me", "upload": "u",
        "defaults": {"vcpus": None, "memory": "1GB", "disk": None},
    }  # fmt: skip


# --- versions on a node ---------------------------------------------------------------------------


ABOUT = VersionAbout("mine", "Alpine", "headless", SHAPE, {"A": "1"}, ready="true")
ROOT = bytes(1024) + b"\xe2\xe1\xf5\xe0" + b"root" + bytes(200_000) + b"end"


async def pieces(data: bytes, size: int = 70_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """Images with a runtime: base-minimal, with files of its own."""
    found = Images(
        definitions={},
        images_dir=tmp_path / "images",
        templates_dir=tmp_path / "templates",
        versions=Versions(tmp_path / "versions"),
    )
    runtime(found, "one")
    return found


def runtime(images: Images, digest: str) -> None:
    folder = images.images_dir / digest
    folder.mkdir(parents=True)
    for name in (*ROOTS, "vmlinuz", "initrd"):
        (folder / name).write_text(f"{digest} {name}")
    write_manifest(
        folder, os="Debian", size_bytes=1, inputs={"kernelArguments": "quiet", "toolsRecipe": "2"}
    )
    images.use("builder", digest)


async def test_a_version_is_kept_by_its_content_and_boots_with_any_runtime(images: Images) -> None:
    fact = await images.versions.keep(ABOUT, pieces(ROOT), size_max=10**6)
    again = await images.versions.keep(ABOUT, pieces(ROOT, 999), size_max=10**6)
    assert fact == again
    assert fact.size_bytes == len(ROOT)
    other = await images.versions.keep(replace(ABOUT, user="me"), pieces(ROOT), size_max=10**6)
    assert other.name != fact.name
    assert other.root == fact.root
    assert images.versions.names() == sorted([fact.name, other.name])

    definition, image = images.get(fact.name)
    assert (definition.env, definition.ready, definition.defaults) == ({"A": "1"}, "true", SHAPE)
    assert image.os == "Alpine"
    assert image.arguments == "quiet"
    assert [one.read_bytes() for one in image.roots] == [b"one tools.erofs", ROOT]
    assert (image.kernel.read_text(), image.initrd.read_text()) == ("one vmlinuz", "one initrd")
    assert images.find(image.digest) == image
    assert images.current(fact.name) == image

    runtime(images, "two")
    newer = images.get(fact.name)[1]
    assert newer.digest != image.digest
    assert newer.roots[0].read_text() == "two tools.erofs"
    assert images.find(image.digest) is not None  # machines of the earlier runtime go on
    images.drop_old(lambda: {image.digest}, now=datetime.now(UTC))
    assert images.find(image.digest) is not None
    images.drop_old(set, now=datetime.now(UTC))
    assert images.find(image.digest) is None
    assert images.find(newer.digest) is not None

    images.versions.drop(fact.name)
    assert images.versions.names() == [other.name]
    assert images.current(fact.name) is None
    assert read_image(newer.folder) is not None
    images.versions.drop("mine@../../images")
    assert images.find("two") is not None


async def test_what_is_no_file_system_or_too_large_is_not_kept(images: Images) -> None:
    for data, why in ((bytes(5000), "no file system"), (b"", "no file"), (ROOT, "more than 0 MiB")):
        with pytest.raises(InvalidArgumentError, match=why):
            await images.versions.keep(ABOUT, pieces(data), size_max=100_000)

    async def breaks_off() -> AsyncIterator[bytes]:
        yield ROOT
        raise InvalidArgumentError("broke off")

    with pytest.raises(InvalidArgumentError, match="broke off"):
        await images.versions.keep(ABOUT, breaks_off(), size_max=10**6)
    assert list((images.images_dir.parent / "versions").iterdir()) == []
    assert images.versions.names() == []


# --- what builds keep ---------------------------------------------------------------------------


def test_a_machine_is_named_after_all_that_led_to_it() -> None:
    steps: list[object] = [["run", "a"], ["run", "b"], ["run", "c"]]
    names = step_names(MEMBER, ["base", "d1"], steps)
    assert len(set(names)) == 3
    assert step_names(MEMBER, ["base", "d1"], steps[:2]) == names[:2]
    for actor, origin, other in (
        (replace(MEMBER, org_id="p"), ["base", "d1"], steps),
        (replace(MEMBER, user_id="v"), ["base", "d1"], steps),
        (MEMBER, ["base", "d2"], steps),
        (MEMBER, ["base", "d1"], [["run", "A"], *steps[1:]]),
    ):
        assert not set(step_names(actor, origin, other)) & set(names)
    assert layers_prefix(MEMBER, "a") != layers_prefix(MEMBER, "b")


@given(st.text(min_size=4).filter(str.strip), st.text(), st.text())
def test_a_secret_is_not_in_the_log(secret: str, before: str, after: str) -> None:
    lines = Lines()
    said = [*lines.feed(f"{before}{secret}{after}\n".encode()), *lines.end()]
    masks = Masks([secret])
    shown = [masks.over(one) for one in said]
    for part in secret.splitlines():
        if len(part.strip()) >= 4 and part.isprintable():
            assert not any(part.strip() in one for one in shown)


def test_lines_of_secrets_are_masked_and_short_ones_are_not() -> None:
    masks = Masks(["-----BEGIN KEY-----\nabcdef\n\nxy\n", "with\x1b[1mcolour"])
    assert masks.over("a line with abcdef and xy") == "a line with *** and xy"
    assert masks.over("-----BEGIN KEY----- withcolour") == "*** ***"
    assert Masks().over("abcdef") == "abcdef"


@pytest.mark.parametrize(
    "secrets",
    [
        {"": "x"}, {"a/b": "x"}, {"../x": "x"}, {"a": ""}, {"a": "x" * 65_537}, {"a": "\x00"},
        {"a b": "x"}, {"1a": "x"}, {str(f"n{one}"): "x" for one in range(21)},
    ],
)  # fmt: skip
def test_secrets_that_no_file_could_be(secrets: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_plan(NewTemplate("t", base="b", secrets=secrets))
    assert caught.value.facts["field"] == "secrets"


# --- secrets on the command line ------------------------------------------------------------------


def test_secrets_are_written_as_dockers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("of a file\n")
    (tmp_path / "NAME").write_text("of its name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN", "of a variable")
    written = {
        "id=a,src=file": {"a": "of a file\n"},
        f"type=file,id=a,source={tmp_path}/file": {"a": "of a file\n"},
        "id=a,env=TOKEN": {"a": "of a variable"},
        "id=TOKEN": {"TOKEN": "of a variable"},
        "id=NAME": {"NAME": "of its name"},
    }
    for one, secrets in written.items():
        template = with_secrets(Template("t").from_template("b"), [one])
        assert template.body({})["secrets"] == secrets, one
    assert "secrets" not in with_secrets(Template("t"), None).body({})


@pytest.mark.parametrize(
    "secret",
    ["", "a", "src=file", "id=", "id=a,src=absent", "id=a,env=ABSENT", "id=a,src=x,env=y",
     "id=a,mode=1", "id=a,src=."],
)  # fmt: skip
def test_a_secret_that_cannot_be_read_is_refused_by_its_name(secret: str) -> None:
    with pytest.raises(typer.BadParameter, match="cannot use --secret"):
        with_secrets(Template("t"), [secret])
