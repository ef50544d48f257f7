"""Files of workspaces, against a guest that plants what it likes and renames while we look."""

import contextlib
import ctypes
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandyard.server.core.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.service.workspaces import beneath, tree
from sandyard.server.service.workspaces.beneath import PASSING, Root
from sandyard.server.service.workspaces.files import name_of, path_of

SECRET = b"the host's own"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the workspace, which no way may lead to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(SECRET)
    return folder


@pytest.fixture
def place(tmp_path: Path, outside: Path) -> Path:
    """A workspace, with everything in it that a guest may plant."""
    place = tmp_path / "workspace"
    place.mkdir()
    (place / "plain").write_bytes(b"plain")
    (place / "folder").mkdir()
    (place / "folder" / "inner").write_bytes(b"inner")
    for name, target in {
        "absolute": str(outside / "secret"),
        "relative": "../outside/secret",
        "up": "..",
        "root": "/",
        "magic": "/proc/self/root/etc/passwd",
        "loop": "loop",
        "dangling": "nothing",
        "within": "folder/inner",
    }.items():
        (place / name).symlink_to(target)
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's path is short.
        here = os.open(place, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    return place


@pytest.fixture
def root(place: Path) -> Iterator[Root]:
    with Root(place) as opened:
        yield opened


def parts(text: str) -> tuple[bytes, ...]:
    return path_of(text.encode(), field="path")


def read(root: Root, path: str) -> bytes:
    fd, _ = tree.opened(root, parts(path))
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def write(root: Root, path: str, data: bytes, *, replaces: bool = True) -> None:
    where = parts(path)
    with tree.drafted(root, where[:-1]) as draft:
        tree.write(draft, where[:-1], data)
        tree.keep(draft, where, replaces=replaces)


def names(root: Root, path: str = "", *, hidden: bool = True) -> list[str]:
    return [one.name.decode() for one in tree.listed(root, parts(path), hidden=hidden)]


@pytest.mark.parametrize("name", ["absolute", "relative", "magic", "loop", "dangling"])
def test_a_link_out_is_nowhere(root: Root, name: str) -> None:
    with pytest.raises(NotFoundError):
        read(root, name)
    with pytest.raises(NotFoundError):
        tree.look(root, parts(name))


@pytest.mark.parametrize("name", ["up", "root"])
@pytest.mark.parametrize(
    "work",
    [
        lambda root, name: tree.listed(root, parts(name), hidden=True),
        lambda root, name: read(root, f"{name}/outside/secret"),
        lambda root, name: write(root, f"{name}/new", b""),
        lambda root, name: tree.make_folder(root, parts(f"{name}/new")),
        lambda root, name: tree.move(root, parts("plain"), parts(f"{name}/x"), replaces=True),
        lambda root, name: tree.move(root, parts(f"{name}/outside"), parts("x"), replaces=True),
        lambda root, name: tree.copy(root, parts(f"{name}/outside"), parts("x"), replaces=True),
        lambda root, name: tree.remove(root, parts(f"{name}/outside")),
    ],
)
def test_nothing_is_done_through_a_link_out(
    root: Root, outside: Path, name: str, work: Callable[[Root, str], object]
) -> None:
    before = sorted(os.listdir(outside.parent))
    with pytest.raises(NotFoundError):
        work(root, name)
    assert (outside / "secret").read_bytes() == SECRET
    assert sorted(os.listdir(outside.parent)) == before


def test_a_link_within_is_followed_to_read_and_is_itself_otherwise(root: Root, place: Path) -> None:
    assert read(root, "within") == b"inner"
    assert tree.look(root, parts("within")).size == 5
    tree.copy(root, parts("within"), parts("copied"), replaces=False)
    assert os.readlink(place / "copied") == "folder/inner"
    # Written over, a link gives way to a file; what it led to is as it was.
    write(root, "within", b"new")
    assert (place / "within").read_bytes() == b"new"
    assert not (place / "within").is_symlink()
    assert (place / "folder/inner").read_bytes() == b"inner"
    write(root, "absolute", b"new")
    assert (place / "absolute").read_bytes() == b"new"
    for name in ("relative", "up", "loop"):
        tree.remove(root, parts(name))
        assert not os.path.lexists(place / name)
    assert (place.parent / "outside/secret").read_bytes() == SECRET


@pytest.mark.parametrize("name", ["fifo", "socket"])
def test_what_is_no_file_is_listed_and_neither_opened_nor_waited_for(
    root: Root, place: Path, name: str
) -> None:
    assert name in names(root)
    with pytest.raises(InvalidArgumentError):
        read(root, name)
    with pytest.raises(InvalidArgumentError):
        tree.copy(root, parts(name), parts("copied"), replaces=False)
    tree.copy(root, parts("folder"), parts("with"), replaces=False)
    os.rename(place / name, place / "folder" / name)
    tree.copy(root, parts("folder"), parts("without"), replaces=False)
    assert names(root, "without") == ["inner"]
    tree.remove(root, parts(f"folder/{name}"))


@pytest.mark.root
def test_a_device_is_not_opened(root: Root, place: Path) -> None:
    os.mknod(place / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    with pytest.raises(InvalidArgumentError):
        read(root, "device")


def test_setuid_does_not_come_along(root: Root, place: Path) -> None:
    (place / "plain").chmod(0o4755)
    tree.copy(root, parts("plain"), parts("copy"), replaces=False)
    write(root, "plain", b"other")
    for name in ("plain", "copy"):
        assert stat.S_IMODE((place / name).stat().st_mode) == 0o755


def test_a_swap_at_full_speed_lets_nothing_out_and_nothing_be_hurt(
    root: Root, place: Path, outside: Path
) -> None:
    (place / "swapped").mkdir()
    (place / "swapped" / "secret").write_bytes(b"harmless")
    (place / "link").symlink_to("../outside")
    over = threading.Event()
    libc = ctypes.CDLL(None)
    one, other = os.fsencode(place / "swapped"), os.fsencode(place / "link")

    def swap() -> None:
        while not over.is_set():
            assert libc.renameat2(-100, one, -100, other, 2) == 0  # RENAME_EXCHANGE

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    try:
        for turn in range(600):
            with contextlib.suppress(SandyardError):
                seen.add(read(root, "swapped/secret"))
            with contextlib.suppress(SandyardError):
                write(root, "swapped/secret", b"harmless")
            with contextlib.suppress(SandyardError):
                seen.update(one.name for one in tree.listed(root, parts("swapped"), hidden=True))
            with contextlib.suppress(SandyardError):
                tree.move(root, parts("swapped/secret"), parts("swapped/m"), replaces=True)
            with contextlib.suppress(SandyardError):
                tree.copy(root, parts("swapped"), parts(f"copies/{turn}"), replaces=True)
            with contextlib.suppress(SandyardError):
                tree.remove(root, parts("swapped/m"))
    finally:
        over.set()
        swapping.join()
    assert b"harmless" in seen
    assert SECRET not in seen
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == SECRET
    found = [at for at in (place / "copies").rglob("secret") if not at.parent.is_symlink()]
    assert all(at.read_bytes() == b"harmless" for at in found)


def test_a_file_is_seen_once_it_is_whole(root: Root, place: Path) -> None:
    before = names(root)
    with contextlib.suppress(RuntimeError), tree.drafted(root, ()) as draft:
        tree.write(draft, (), b"half")
        assert names(root) == before
        raise RuntimeError
    assert names(root) == before
    with pytest.raises(AlreadyExistsError):
        write(root, "plain", b"", replaces=False)
    assert (place / "plain").read_bytes() == b"plain"
    with pytest.raises(InvalidArgumentError):
        write(root, "folder", b"")
    write(root, "a/b/c", b"deep")
    assert (place / "a/b/c").read_bytes() == b"deep"
    assert not list(place.rglob(PASSING.decode() + "*"))


def test_names_are_bytes_and_some_are_refused(root: Root, place: Path) -> None:
    for name in (b"new\nline", b"\xff\xfe", "a\u2215b".encode(), b"n" * 255, b"-rf", b"*", b" "):
        with tree.drafted(root, ()) as draft:
            tree.keep(draft, (name,), replaces=False)
        assert name in os.listdir(os.fsencode(place))
        assert name in [one.name for one in tree.listed(root, (), hidden=True)]
        tree.remove(root, (name,))
    for text in ("../x", "a/../b", "/..", "a\0b", "n" * 256, "x/" * 2048):
        with pytest.raises(InvalidArgumentError):
            parts(text)
    assert parts("//a/./b/") == (b"a", b"b")
    for text in ("", "/", "a/b", "..", "."):
        with pytest.raises(InvalidArgumentError):
            name_of(text.encode(), field="name")
    for work in (
        lambda: tree.remove(root, ()),
        lambda: tree.move(root, (), parts("x"), replaces=True),
        lambda: tree.copy(root, (), parts("x"), replaces=True),
    ):
        with pytest.raises(InvalidArgumentError):
            work()


def test_moving_and_copying_keep_what_is_there(root: Root, place: Path) -> None:
    write(root, "other", b"other")
    for work in (tree.move, tree.copy):
        with pytest.raises(AlreadyExistsError):
            work(root, parts("plain"), parts("other"), replaces=False)
        with pytest.raises(SandyardError):
            work(root, parts("folder"), parts("folder/within"), replaces=False)
        with pytest.raises(NotFoundError):
            work(root, parts("missing"), parts("x"), replaces=False)
    assert (place / "other").read_bytes() == b"other"
    tree.copy(root, parts("plain"), parts("other"), replaces=True)
    assert (place / "other").read_bytes() == b"plain"
    tree.move(root, parts("folder"), parts("new/place"), replaces=False)
    assert (place / "new/place/inner").read_bytes() == b"inner"
    assert tree.measured(root, parts("new")) == tree.Measure(5, 1, 1)


def test_the_deepest_tree_is_removed(root: Root, place: Path) -> None:
    (place / "deep").mkdir()
    here = os.open(place / "deep", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(InvalidArgumentError):
        tree.copy(root, parts("deep"), parts("copied"), replaces=False)
    tree.remove(root, parts("deep"))
    assert not {"deep", "copied"} & set(os.listdir(place))
    assert not [one for one in os.listdir(place) if one.startswith(PASSING.decode())]


class _NoFlags:
    """A C library on a file system that knows no flags of renameat2."""

    def __init__(self, known: Any) -> None:
        self.syscall = known.syscall

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1


def test_a_network_file_system_will_do(
    root: Root, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_tmpfile(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return plain(path, flags, *more, **options)

    plain = os.open
    monkeypatch.setattr(beneath, "_libc", _NoFlags(beneath._libc))
    monkeypatch.setattr(os, "open", without_tmpfile)
    for replaces in (False, True):
        write(root, "new", b"new", replaces=replaces)
        assert (place / "new").read_bytes() == b"new"
    with contextlib.suppress(RuntimeError), tree.drafted(root, ()):
        raise RuntimeError
    for work in (tree.move, tree.copy):
        for source, target in (("new", "plain"), ("folder", "plain"), ("new", "folder")):
            with pytest.raises(AlreadyExistsError):
                work(root, parts(source), parts(target), replaces=False)
    assert (place / "plain").read_bytes() == b"plain"
    tree.move(root, parts("new"), parts("moved"), replaces=False)
    tree.move(root, parts("within"), parts("link"), replaces=False)
    assert os.readlink(place / "link") == "folder/inner"
    tree.copy(root, parts("folder"), parts("copied"), replaces=False)
    tree.move(root, parts("copied"), parts("renamed"), replaces=False)
    assert (place / "renamed/inner").read_bytes() == b"inner"
    with pytest.raises(SandyardError):
        tree.move(root, parts("renamed"), parts("renamed/in"), replaces=False)
    tree.remove(root, parts("renamed"))
    assert not {"new", "within", "copied", "renamed"} & set(os.listdir(place))
    assert not [one for one in os.listdir(place) if one.startswith(PASSING.decode())]


def test_a_folder_that_is_written_into_goes_out_of_sight_whole(root: Root, place: Path) -> None:
    over = threading.Event()
    opened = [os.open(place / "folder", os.O_RDONLY)]
    os.mkdir("s", dir_fd=opened[0])
    opened.append(os.open("s", os.O_RDONLY, dir_fd=opened[0]))

    def fill() -> None:
        for number in range(3000):
            if over.is_set():
                return
            for fd in opened:
                with contextlib.suppress(OSError):
                    os.mkdir(f"g{number}", dir_fd=fd)
                    os.mkdir(f"g{number}/q", dir_fd=fd)

    filling = threading.Thread(target=fill)
    filling.start()
    try:
        for _ in range(5):
            with contextlib.suppress(UnavailableError):
                tree.remove(root, parts("folder"))
            assert "folder" not in names(root)
            (place / "folder").mkdir()
    finally:
        over.set()
        filling.join()
        for fd in opened:
            os.close(fd)
    tree.sweep(root, before=time.time() + 60)
    assert not [one for one in os.listdir(place) if one.startswith(PASSING.decode())]


def test_what_is_moved_onto_itself_is_there(root: Root, place: Path) -> None:
    os.link(place / "plain", place / "second")
    (place / "same").symlink_to(".")
    for source, target in (("plain", "second"), ("second", "second"), ("second", "same/second")):
        tree.move(root, parts(source), parts(target), replaces=True)
        tree.copy(root, parts(source), parts(target), replaces=True)
        assert (place / "second").read_bytes() == b"plain"
    assert tree.weighed(root, parts("absolute")) == 0
    assert tree.weighed(root, parts("folder")) == 5


def test_what_was_broken_off_is_swept_up(root: Root, place: Path) -> None:
    left = place / (PASSING.decode() + "1")
    (left / "deeper").mkdir(parents=True)
    assert left.name not in names(root)
    assert tree.sweep(root, before=time.time() - 60) == 0
    assert left.exists()
    assert tree.sweep(root, before=time.time() + 60) == 1
    assert not left.exists()
