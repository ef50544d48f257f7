"""The guest's own files, written where there is no room for others."""

import errno
import os
import socket
from pathlib import Path

import pytest

from sandyard.server.guest import patience, system
from sandyard.server.guest.context import Context
from sandyard.server.guest.ops.dial import _connect_here
from sandyard.server.guest.system import AbsentError


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which no other file can be made."""
    real = os.open

    def refusing(path: object, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_EXCL:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("sandyard.server.guest.system.os.open", refusing)


@pytest.mark.usefixtures("full")
def test_on_a_full_disk_a_file_is_written_over_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "shadow"
    file.write_text("root:a:longer than what comes\n")
    file.chmod(0o644)
    system._replace(file, "root:*:\n", 0o600)
    assert file.read_text() == "root:*:\n"
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="the disk is full"):
        system._replace(file, "x" * 100_000, 0o600)
    assert file.read_text() == "root:*:\n"
    with pytest.raises(FileNotFoundError):
        system._replace(tmp_path / "other", "x", 0o600)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="symbolic"):
        system._replace(tmp_path / "link", "x", 0o600)
    assert file.read_text() == "root:*:\n"


def test_etc_environment_is_read_as_at_a_login(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/environment").write_text(
        '# a comment\nPLAIN=one two\nexport QUOTED="three four" # five\n'
        "SINGLE='s'\nnonsense\n=x\n1A=x\n"
    )
    root = os.open(tmp_path, os.O_PATH)
    try:
        assert system.system_environment(root) == {
            "PLAIN": "one two", "QUOTED": "three four", "SINGLE": "s",
        }  # fmt: skip
        (tmp_path / "etc/environment").unlink()
        assert system.system_environment(root) == {}
    finally:
        os.close(root)


def test_a_machine_waits_as_much_longer_as_its_host_says_and_no_less_than_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "RUN", tmp_path)
    (tmp_path / "token").write_text("first\n")
    try:
        for told, longer in ((7.5, 7.5), (None, 1.0), (0.1, 1.0), (1e9, 100.0)):
            context = Context(-1)
            context.remember(token="t", env={"A": "b"}, pace=told)
            assert patience.patient(2.0) == 2.0 * longer
            patience.go_by(None)
            again = Context(-1)  # the agent was started again
            assert (again.token, again.env) == ("t", {"A": "b"})
            assert patience.patient(2.0) == 2.0 * longer
        (tmp_path / "state").write_text('{"token": "old", "env": {}}')  # an older agent's
        assert Context(-1).token == "old"
        assert patience.patient(2.0) == 2.0
    finally:
        patience.go_by(None)


async def test_nothing_listens_is_said_so_in_a_machine_without_ipv6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = socket.socket

    def made(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, kind)

    monkeypatch.setattr("sandyard.server.guest.ops.dial.socket.socket", made)
    with real() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(AbsentError, match=f"port {port}: nothing listens"):
            await _connect_here(port)
        taken.listen()
        (await _connect_here(port)).close()
