"""What the agent tells of a folder that it watches, on this machine's own kernel."""

import os
import select
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandyard.server.core.ops import ChangeKind, FileChange
from sandyard.server.guest import watch
from sandyard.server.guest.parts import part_of
from sandyard.server.guest.watch import TooManyError, Watcher

SOON_S = 10.0
Told = tuple[str, str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "top" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "top" / "old").write_text("x")
    return tmp_path / "top"


@pytest.fixture
def watcher(folder: Path) -> Iterator[Watcher]:
    made = Watcher()
    made.open(os.fsencode(folder), recursive=True)
    yield made
    made.close()


def told(watcher: Watcher, folder: Path, until: Told) -> list[Told]:
    """Return what is told, up to a certain change."""
    said: list[Told] = []
    while until not in said:
        assert select.select([watcher.fileno()], [], [], SOON_S)[0], said
        said += [shown(one, folder) for one in watcher.changes()]
    return said


def shown(change: FileChange, folder: Path) -> Told:
    return change.kind.value, os.fsdecode(change.path).removeprefix(f"{folder}/")


def test_files_are_told_of_wherever_they_are(watcher: Watcher, folder: Path) -> None:
    (folder / "new").write_text("x")
    (folder / "deep/er/below").write_text("y")
    (folder / "old").chmod(0o600)
    (folder / "old").unlink()
    said = told(watcher, folder, ("removed", "old"))
    assert said == [
        ("created", "new"), ("modified", "new"), ("created", "deep/er/below"),
        ("modified", "deep/er/below"), ("attributes", "old"), ("removed", "old"),
    ]  # fmt: skip
    odd = os.fsencode(folder) + b"/a\nb\xff"
    os.close(os.open(odd, os.O_CREAT))
    assert [one.path for one in watcher.changes()] == [odd]


def test_of_one_folder_alone_nothing_below_is_told(folder: Path) -> None:
    made = Watcher()
    made.open(os.fsencode(folder), recursive=False)
    (folder / "deep/er/below").write_text("y")
    (folder / "sub").mkdir()
    (folder / "sub/inside").write_text("y")
    (folder / "last").touch()
    said = told(made, folder, ("created", "last"))
    assert said == [("created", "sub"), ("created", "last")]
    made.close()


def test_a_new_folder_is_watched_and_what_is_in_it_told_once(
    watcher: Watcher, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "made/with").mkdir(parents=True)
    (tmp_path / "made/with/file").write_text("x")
    (tmp_path / "made").rename(folder / "made")
    said = told(watcher, folder, ("created", "made/with/file"))
    assert sorted(said) == [
        ("created", "made"), ("created", "made/with"), ("created", "made/with/file"),
    ]  # fmt: skip
    (folder / "fast/er").mkdir(parents=True)
    (folder / "fast/er/f").write_text("x")
    said = told(watcher, folder, ("created", "fast/er/f"))
    (folder / "fast/er/later").write_text("x")
    said += told(watcher, folder, ("modified", "fast/er/later"))
    for one in ("fast", "fast/er", "fast/er/f", "fast/er/later"):
        assert said.count(("created", one)) == 1, said


def test_what_moves_is_told_from_where_and_watched_where_it_is(
    watcher: Watcher, folder: Path, tmp_path: Path
) -> None:
    (folder / "old").rename(folder / "deep/new")
    (move,) = watcher.changes()
    top = os.fsencode(folder)
    assert move == FileChange(top + b"/deep/new", ChangeKind.MOVED, False, top + b"/old")
    (folder / "deep").rename(folder / "shallow")
    (folder / "shallow/er/f").write_text("x")
    assert told(watcher, folder, ("modified", "shallow/er/f")) == [
        ("moved", "shallow"), ("created", "shallow/er/f"), ("modified", "shallow/er/f"),
    ]  # fmt: skip
    # What is moved out of sight is removed, and not watched any more.
    (folder / "shallow").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/er/f").write_text("more")
    (folder / "last").touch()
    assert told(watcher, folder, ("created", "last")) == [
        ("removed", "shallow"), ("created", "last"),
    ]  # fmt: skip


def test_what_is_written_by_the_agent_is_told_as_one_file(watcher: Watcher, folder: Path) -> None:
    for target, replaces in (("new", False), ("old", True), ("made", False)):
        part = Path(os.fsdecode(part_of(os.fsencode(folder / target), replaces=replaces)))
        if target == "made":
            (part / "deep").mkdir(parents=True)
            (part / "deep/f").write_text("x")
        else:
            part.write_text("x")
        watcher.changes()
        part.rename(folder / target)
    (folder / "made/deep/later").touch()
    assert told(watcher, folder, ("created", "made/deep/later")) == [
        ("created", "made"), ("created", "made/deep"), ("created", "made/deep/f"),
        ("created", "made/deep/later"),
    ]  # fmt: skip
    for part_is_over in (False, True):
        part = Path(os.fsdecode(part_of(os.fsencode(folder / "f"), replaces=part_is_over)))
        part.write_text("x")
        part.rename(folder / "f")
    (folder / "end").touch()
    assert told(watcher, folder, ("created", "end")) == [
        ("created", "f"), ("modified", "f"), ("created", "end"),
    ]  # fmt: skip


def test_what_is_made_again_is_told_again(watcher: Watcher, folder: Path) -> None:
    for _ in range(3):
        (folder / "sub").mkdir()
        (folder / "sub/f").write_text("x")
        assert told(watcher, folder, ("created", "sub/f")).count(("created", "sub")) == 1
        (folder / "sub/f").unlink()
        (folder / "sub").rmdir()
        assert told(watcher, folder, ("removed", "sub")).count(("removed", "sub")) == 1


def test_nothing_is_taken_for_what_was_told_before(
    watcher: Watcher, folder: Path, tmp_path: Path
) -> None:
    def make(name: str, *inside: str) -> None:
        """Make a folder that is there, with what is in it, before it is looked into."""
        (folder / name).mkdir()
        for one in inside:
            (folder / name / one).mkdir()
        told(watcher, folder, ("created", f"{name}/{inside[-1]}"))

    make("a", "f")
    (folder / "a/f").rmdir()
    (tmp_path / "x").write_text("x")
    (tmp_path / "x").rename(folder / "a/f")
    assert ("created", "a/f") in told(watcher, folder, ("created", "a/f"))
    make("b", "f")
    (folder / "b").rename(folder / "c")
    (folder / "b").mkdir()
    told(watcher, folder, ("created", "b"))
    (folder / "b/f").touch()
    told(watcher, folder, ("created", "b/f"))
    make("d", "sub")
    (folder / "d").rename(tmp_path / "elsewhere")
    (folder / "d").mkdir()
    told(watcher, folder, ("created", "d"))
    (folder / "d/sub").mkdir()
    told(watcher, folder, ("created", "d/sub"))
    (folder / "d/sub/f").touch()
    told(watcher, folder, ("created", "d/sub/f"))


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_it_is_over_when_the_folder_is_gone(
    watcher: Watcher, folder: Path, tmp_path: Path, how: str
) -> None:
    assert not watcher.is_over
    if how == "moved":
        folder.rename(tmp_path / "other")
    else:
        for one in (folder / "deep/er", folder / "deep"):
            one.rmdir()
        (folder / "old").unlink()
        folder.rmdir()
    while not watcher.is_over:
        assert select.select([watcher.fileno()], [], [], SOON_S)[0]
        watcher.changes()


def test_an_overflow_is_told_and_what_came_meanwhile_is_watched(
    watcher: Watcher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(most // 2 + 1):
        (folder / "deep" / "a").touch()
        (folder / "deep" / "a").rename(folder / "deep" / f"b{number % 2}")
    (folder / "unseen").mkdir()
    said = told(watcher, folder, ("overflow", str(folder)))
    assert ("created", "unseen") not in said
    (folder / "unseen/f").write_text("x")
    told(watcher, folder, ("modified", "unseen/f"))
    # As many as may be watched are; of the next it is told that it is not.
    monkeypatch.setattr(watch, "FOLDERS_MAX", 5)
    (folder / "fifth").mkdir()
    (folder / "sixth").mkdir()
    told(watcher, folder, ("overflow", "sixth"))


@pytest.mark.slow  # the kernel's queue is full only after so many
def test_it_is_over_although_the_end_was_one_event_too_many(watcher: Watcher, folder: Path) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(most + 10):
        (folder / f"{number % 100}").touch()
        (folder / f"{number % 100}").unlink()
    shutil.rmtree(folder)
    (folder).mkdir()  # another of the same name
    while not watcher.is_over:
        assert select.select([watcher.fileno()], [], [], SOON_S)[0]
        watcher.changes()


def test_what_cannot_be_watched_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, kind in ((folder / "none", FileNotFoundError), (folder / "old", NotADirectoryError)):
        made = Watcher()
        with pytest.raises(kind):
            made.open(os.fsencode(path), recursive=False)
        made.close()
    monkeypatch.setattr(watch, "FOLDERS_MAX", 2)
    made = Watcher()
    with pytest.raises(TooManyError):
        made.open(os.fsencode(folder), recursive=True)
    made.close()
