"""What builds do with archives and layers, without a machine: as root, in folders of their own."""

import json
import os
import stat
import struct
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from tests.support.oci import (
    docker_archive,
    file_entry,
    folder_entry,
    layer,
    link_entry,
    oci_layout,
    several,
    tree,
)

from sandyard.server.service.builds import archive, recipes

LOWER = layer(
    [
        folder_entry("usr"), folder_entry("usr/bin"), file_entry("usr/bin/a", b"a", mode=0o4755),
        link_entry("bin", "usr/bin"), folder_entry("run"), folder_entry("var"),
        link_entry("var/run", "/run"), folder_entry("d"), file_entry("d/1", b"1"),
        file_entry("d/2", b"2"), folder_entry("op"), file_entry("op/old", b"old"),
        folder_entry("to-file"), file_entry("to-file/x", b"x"), file_entry("to-folder", b"f"),
        file_entry("h1", b"hard"), file_entry("owned", b"o", uid=1234, gid=4321, mtime=12345),
        file_entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        file_entry("a b\tc", b"sp"), file_entry("n\nl", b"nl"), file_entry("bs\\x", b"x"),
        file_entry("b\xff".encode("latin-1").decode("utf-8", "surrogateescape"), b"bytes"),
    ]
)  # fmt: skip
UPPER = layer(
    [
        file_entry("d/.wh.1"), folder_entry("op"), file_entry("op/.wh..wh..opq"),
        file_entry("op/new", b"new"), file_entry("to-file", b"now a file"),
        folder_entry("to-folder"), file_entry("to-folder/in", b"in"),
        link_entry("h2", "h1", is_hard=True), file_entry("var/run/through", b"t"),
        file_entry("bin/b", b"b"), file_entry(".wh.a b\tc"), file_entry(".wh.n\nl"),
        file_entry(".wh.bs\\x"), folder_entry("."), folder_entry("./usr", mode=0o700),
    ]
)  # fmt: skip


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def choose(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", Path(archive.__file__).read_text()],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def unpack(folder: Path) -> Path:
    script = recipes.UNPACK.replace(recipes.FOLDER, str(folder))
    script = script.replace(recipes.BUSYBOX, "/bin/busybox")
    subprocess.run(["sh", "-c", script], check=True, capture_output=True)
    return folder / "tree"


@pytest.mark.root
@pytest.mark.parametrize("compress", ["", "gzip", "zstd"])
def test_layers_become_a_tree(tmp_path: Path, compress: Literal["", "gzip", "zstd"]) -> None:
    write(tmp_path / "image", oci_layout([LOWER, UPPER], {}, compress=compress))
    assert choose(tmp_path).returncode == 0
    found = unpack(tmp_path)
    assert sorted(os.listdir(os.fsencode(found))) == sorted(
        [b"bin", b"d", b"h1", b"h2", b"null", b"op", b"owned", b"run", b"to-file", b"to-folder",
         b"usr", b"var", b"b\xff"]
    )  # fmt: skip
    assert os.listdir(found / "d") == ["2"]
    assert os.listdir(found / "op") == ["new"]
    assert (found / "to-file").read_bytes() == b"now a file"
    assert (found / "to-folder/in").read_bytes() == b"in"
    assert os.readlink(found / "bin") == "usr/bin"
    assert (found / "usr/bin/b").read_bytes() == b"b", "through a link of an earlier layer"
    assert (found / "run/through").read_bytes() == b"t", "also through an absolute one"
    assert stat.S_IMODE((found / "usr").stat().st_mode) == 0o700
    assert stat.S_IMODE((found / "usr/bin/a").stat().st_mode) == 0o4755
    assert (found / "h1").stat().st_ino == (found / "h2").stat().st_ino
    owned = (found / "owned").stat()
    assert (owned.st_uid, owned.st_gid, owned.st_mtime) == (1234, 4321, 12345)
    assert (found / "null").stat().st_rdev == os.makedev(1, 3)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "tree"]


@pytest.mark.root
def test_of_twelve_layers_the_last_that_says_something_counts(tmp_path: Path) -> None:
    net_raw = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # a vfs_cap_data of version 2
    ping = file_entry("ping", b"ping", mode=0o755)
    ping.pax_headers = {"SCHILY.xattr.security.capability": net_raw.decode("latin-1")}
    layers = [layer([folder_entry("d"), ping, file_entry("d/kept", b"0")])]
    # Each hides what the one before has added, and adds what the one before has hidden.
    layers += [
        layer(
            [
                file_entry(f"d/.wh.é {number - 1}\n"), file_entry(f"d/é {number}\n", b"now"),
                file_entry("d/turn", b"%d" % number, mode=0o600 + number % 8, uid=number),
                file_entry(".wh.gone") if number % 2 else file_entry("gone/x", b"x"),
            ]
        )
        for number in range(1, 12)
    ]  # fmt: skip
    write(tmp_path / "image", oci_layout(layers, {}, compress="gzip"))
    assert choose(tmp_path).returncode == 0
    found = unpack(tmp_path)
    assert sorted(os.listdir(found)) == ["d", "ping"]
    assert sorted(os.listdir(found / "d")) == ["kept", "turn", "é 11\n"]
    turn = found / "d/turn"
    assert (turn.read_bytes(), turn.stat().st_uid) == (b"11", 11)
    assert stat.S_IMODE(turn.stat().st_mode) == 0o603
    assert os.getxattr(found / "ping", "security.capability") == net_raw


@pytest.mark.root
def test_hostile_layers_stay_in_their_tree(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    odd = [file_entry("-rf", b"x"), file_entry("same", b"1"), file_entry("same", b"2")]
    hostile = [
        file_entry("../../outside/x", b"x"), link_entry("way", str(outside)),
        file_entry("../../outside/.wh.kept"), file_entry("way/.wh.kept"), file_entry(".wh..."),
        file_entry(".wh."),
    ]  # fmt: skip
    folder = tmp_path / "build"
    write(folder / "image", oci_layout([layer(odd), layer(hostile), layer(hostile)], {}))
    assert choose(folder).returncode == 0
    found = unpack(folder)
    assert os.listdir(outside) == ["kept"]
    assert (found / "same").read_bytes() == b"2"
    assert (found / "-rf").exists()
    assert (found / "outside/x").exists(), "the tree is all there is"
    # What cannot be unpacked fails, and changes nothing elsewhere either.
    folder = tmp_path / "other"
    through = [link_entry("way", str(outside)), file_entry("way/x", b"x")]
    write(folder / "image", oci_layout([layer(through)], {}))
    assert choose(folder).returncode == 0
    with pytest.raises(subprocess.CalledProcessError):
        unpack(folder)
    assert os.listdir(outside) == ["kept"]


@pytest.mark.parametrize("order", [1, -1])
def test_the_image_for_sandboxes_is_chosen(tmp_path: Path, order: int) -> None:
    ours = oci_layout([tree({"ours": b"x"})], {"Env": ["A=ours"]})
    theirs = oci_layout([tree({"theirs": b"x"})], {}, architecture="arm64")
    write(tmp_path / "image", several(*(ours, theirs)[::order]))
    assert choose(tmp_path).returncode == 0
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["config"] == {"Env": ["A=ours"]}
    (name,) = (tmp_path / "layers").read_text().splitlines()
    assert b"ours" in (tmp_path / name).read_bytes()


def test_the_configuration_of_another_platform_says_so(tmp_path: Path) -> None:
    write(tmp_path / "image", oci_layout([tree({"a": b"x"})], {}, architecture="arm64"))
    assert choose(tmp_path).returncode == 0
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "arm64"


def test_two_images_are_refused_and_two_names_of_one_are_not(tmp_path: Path) -> None:
    one, other = (oci_layout([tree({name: b"x"})], {}) for name in "ab")
    write(tmp_path / "one/image", several(one, one))
    assert choose(tmp_path / "one").returncode == 0
    write(tmp_path / "two/image", several(one, other))
    done = choose(tmp_path / "two")
    assert done.returncode == 1
    assert "2 images, and one is needed" in done.stderr


def test_what_docker_saves_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "saved").write_bytes(docker_archive([LOWER], {"User": "7"}))
    with tarfile.open(tmp_path / "saved") as saved:
        saved.extractall(tmp_path / "image", filter="data")
    assert choose(tmp_path).returncode == 0
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"User": "7"}
    assert (tmp_path / "layers").read_text() == "image/0/layer.tar\n"
