"""The journal of connections: bounded, and never lost in silence."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandyard.server.egress.journal import (
    A_SECOND,
    DAYS_MAX,
    LINES_MAX,
    Journal,
    lines_in,
    newest_of,
)
from sandyard.server.node.host.egress import journal_paths, read_journal

_DAY = 86400.0


class Files:
    """Two files, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "1", folder / "2"]
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self.descriptors = [os.open(one, flags, 0o600) for one in self.paths]
        self.now = 1_000_000.0

    def journal(self) -> Journal:
        return Journal(self.descriptors, lambda: self.now)

    def lines(self) -> list[dict[str, object]]:
        return newest_of([one.read_bytes() for one in self.paths], now=self.now)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    made = Files(tmp_path)
    yield made
    for one in made.descriptors:
        os.close(one)


def test_the_oldest_lines_make_room(files: Files) -> None:
    journal = files.journal()
    for number in range(LINES_MAX + 100):
        files.now += 0.02
        journal.write({"number": number})
        if number % 1500 == 0:
            journal = files.journal()  # another process goes on with the files
    found = files.lines()
    assert LINES_MAX // 2 <= len(found) <= LINES_MAX
    last = [one["number"] for one in found]
    assert last == list(range(LINES_MAX + 100 - len(found), LINES_MAX + 100))


def test_lines_of_one_moment_have_different_times(files: Files) -> None:
    journal = files.journal()
    for _ in range(3):
        journal.write({})
    times = [float(str(one["time"])) for one in files.lines()]
    assert times == sorted(set(times))
    assert times[-1] - times[0] < 0.001


def test_a_line_is_found_although_its_file_seems_older(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    for one in journal_paths(folder):
        one.parent.mkdir(parents=True, exist_ok=True)
        one.touch()
    path = journal_paths(folder)[0]
    for time in (1000.0, 1000.002):
        with path.open("a") as file:
            file.write(json.dumps({"time": time}) + "\n")
    os.utime(path, (999.999, 999.999))
    found = read_journal(folder, now=1001.0, since=1000.0)
    assert [one["time"] for one in found] == [1000.002]


def test_a_flood_is_counted(files: Files) -> None:
    journal = files.journal()
    for _ in range(A_SECOND + 50):
        journal.write({"verdict": "refused"})
    assert len(files.lines()) == A_SECOND
    files.now += 1
    journal.write({"verdict": "refused"})
    assert [one.get("count") for one in files.lines()[-2:]] == [50, None]


def test_lines_are_removed_after_some_days(files: Files) -> None:
    journal = files.journal()
    journal.write({"a": 1})
    files.now += (DAYS_MAX / 2 + 0.1) * _DAY
    journal.write({"a": 2})
    assert [one["a"] for one in files.lines()] == [1, 2]
    files.now += DAYS_MAX / 2 * _DAY
    journal.tidy()
    assert [one["a"] for one in files.lines()] == [2]
    assert sum(one.stat().st_size > 0 for one in files.paths) == 1
    files.now += DAYS_MAX * _DAY
    assert files.lines() == []


def test_a_full_disk_loses_lines_and_says_how_many(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, write = files.journal(), os.write
    journal.write({"a": 1})

    def full(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        journal.write({"a": 2})

    def broken(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        journal.write({"a": 3})
    files.now += 1
    journal.write({"a": 4})
    assert [(one.get("a"), one.get("count")) for one in files.lines()] == [
        (1, None), (None, 2), (4, None),
    ]  # fmt: skip


def test_damaged_lines_are_left_out() -> None:
    good = json.dumps({"time": 5.0, "a": "\n"}).encode()
    assert lines_in(good + b"\nnonsense\n[1]\n{}\n" + good[:9]) == [{"time": 5.0, "a": "\n"}]


def test_only_what_is_new_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"time": float(number)}).encode() for number in range(1000)]
    data, parsed, loads = b"\n".join(lines), 0, json.loads

    def counted(text: bytes) -> object:
        nonlocal parsed
        parsed += 1
        return loads(text)

    monkeypatch.setattr(json, "loads", counted)
    assert [one["time"] for one in lines_in(data, since=996.0)] == [997.0, 998.0, 999.0]
    assert parsed == 4
    assert len(lines_in(data)) == 1000
