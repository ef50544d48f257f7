"""The guest's own files, written where there is no room for others."""

import asyncio
import errno
import os
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from sandyard.server.guest import connections, context, patience, processes, system
from sandyard.server.guest.context import Context
from sandyard.server.guest.ops.dial import _connect_here
from sandyard.server.guest.system import AbsentError
from sandyard.server.guest.utmp import Utmp


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
    system.replace_file(file, "root:*:\n", 0o600)
    assert file.read_text() == "root:*:\n"
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="the disk is full"):
        system.replace_file(file, "x" * 100_000, 0o600)
    assert file.read_text() == "root:*:\n"
    with pytest.raises(FileNotFoundError):
        system.replace_file(tmp_path / "other", "x", 0o600)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="symbolic"):
        system.replace_file(tmp_path / "link", "x", 0o600)
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


@pytest.mark.parametrize("before", [None, b"", b"root:old:1:2:3:4:5:6:", b"user:x:::::::\n", b"/"])
def test_a_password_is_written_whatever_was_made_of_the_file(
    tmp_path: Path, before: bytes | None
) -> None:
    shadow = tmp_path / "shadow"
    if before == b"/":
        shadow.symlink_to("/etc/shadow")
    elif before is not None:
        shadow.write_bytes(before)
    system._write_password(shadow, "*")
    assert not shadow.is_symlink()
    lines = shadow.read_text().splitlines()
    (root,) = (line for line in lines if line.startswith("root:"))
    assert root.split(":")[1] == "*"
    assert len(root.split(":")) == 9
    if before and before.startswith(b"user"):
        assert "user:x:::::::" in lines


def test_what_is_not_text_in_a_password_file_stays_as_it_is(tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.write_bytes(b"root:a:1::::::\n\xff\xfe:x\x85y:::::::\n")
    system._write_password(shadow, "b")
    assert shadow.read_bytes() == b"root:b:1::::::\n\xff\xfe:x\x85y:::::::\n"


def test_what_stands_where_a_file_of_settings_should_is_none(tmp_path: Path) -> None:
    (tmp_path / "etc/environment").mkdir(parents=True)
    (tmp_path / "etc/passwd").mkdir()
    root, before = os.open(tmp_path, os.O_PATH), len(os.listdir("/proc/self/fd"))
    try:
        assert system.system_environment(root) == {}
        with pytest.raises(system.RefusedError, match="directory"):
            system.find_account(root, "somebody")
        assert len(os.listdir("/proc/self/fd")) == before
        (tmp_path / "etc/environment").rmdir()
        (tmp_path / "etc/environment").write_bytes(b"A=1\0\nB=2\n")
        assert system.system_environment(root) == {"B": "2"}
    finally:
        os.close(root)


def test_a_user_with_a_group_has_that_group_alone(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("app:x:7:8::/app:/bin/ash\n")
    (tmp_path / "etc/group").write_text("app:x:8:\nvideo:x:44:app\nempty:x:nine:\n")
    root = os.open(tmp_path, os.O_PATH)
    try:

        def found(user: str) -> tuple[int, int, tuple[int, ...]]:
            account = system.find_account(root, user)
            return account.uid, account.gid, account.groups

        assert found("app") == (7, 8, (8, 44))
        assert found("app:video") == found("7:44") == (7, 44, (44,))
        assert found("0:5") == (0, 5, (5,))
        assert found("99:100") == (99, 100, (100,))
        for user in ("app:nobody", "app:empty", "app:", "nobody:44", ":44", "app:8:9"):
            with pytest.raises(system.NoUserError):
                system.find_account(root, user)
    finally:
        os.close(root)


@pytest.mark.parametrize(
    ("number", "is_told"),
    [(errno.ENOENT, False), (errno.EOPNOTSUPP, False), (errno.EPERM, True)],
)
def test_a_kernel_that_lists_no_connections_keeps_them(number: int, is_told: bool) -> None:
    class Diag:
        def send(self, _: bytes) -> None: ...

        def recv(self, _: int) -> bytes:
            return struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -number) + bytes(16)

    listed = connections._connections(Diag(), socket.AF_INET)  # type: ignore[arg-type]
    if is_told:
        with pytest.raises(OSError, match="not permitted"):
            list(listed)
    else:
        assert list(listed) == []


async def test_the_usage_of_the_last_hour_is_kept_in_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(context, "_HISTORY_PERIOD_S", 0.0)
    ticks = iter([(0, 0), (50, 100), (50, 200), (50, 200)])
    last = (60, 300)
    monkeypatch.setattr(system, "cpu_ticks", lambda: next(ticks, last))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with tempfile.TemporaryDirectory() as folder:
        root_fd = os.open(folder, os.O_RDONLY)
        try:
            history = context.History(root_fd)
            sampling = asyncio.ensure_future(history.sample())
            while len(history.samples) < context._HISTORY:
                await asyncio.sleep(0)
            first, second, third, *_ = history.samples
            for _ in range(1000):
                await asyncio.sleep(0)
        finally:
            sampling.cancel()
            os.close(root_fd)
    assert [one.cpu_percent for one in (first, second, third)] == [100.0, 0.0, 0.0]
    assert abs(first.at_ms / 1000 - time.time()) < 60
    assert 0 < first.memory_used_bytes < first.memory_total_bytes
    assert 0 < first.disk_used_bytes < first.disk_total_bytes
    assert len(history.samples) == context._HISTORY


async def test_how_busy_a_machine_is_counts_from_the_first_look_after_it_stood_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, slept = (0.0, 0.0), []

    async def sleep(time_s: float) -> None:
        nonlocal done
        slept.append(time_s)
        done = (done[0] + time_s, done[1] + time_s / 4)  # a quarter of the time busy

    monkeypatch.setattr(context, "_work_done", lambda: done)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    load = context.Load()
    done = (10.0, 5.0)
    assert await load.recent_percent(60.0) == 50.0
    load.forget()
    done = (3600.0, 3000.0)
    assert slept == []
    # There is no sample yet, or one of this moment alone: it is measured.
    assert await load.recent_percent(60.0) == 25.0
    assert slept == [0.5]
    done = (3610.0, 3001.0)
    assert await load.recent_percent(60.0) == 10.0
    assert await load.recent_percent(5.0) == 10.0
    load._work.append(done)
    assert await load.recent_percent(5.0) == 25.0
    assert slept == [0.5, 0.5]


@pytest.mark.parametrize(
    ("mount", "is_local"),
    [
        ("22 1 254:0 / / rw - ext4 /dev/vda rw", True),
        ("23 22 0:21 / /proc rw,nosuid shared:5 - proc proc rw", True),
        ("24 22 0:40 / /workspace rw - nfs4 10.0.0.1:/w rw", False),
        ("25 22 0:41 / /mnt/s3 rw - fuse.s3fs s3fs rw", False),
        ("26 23 0:22 / /root/proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw,fd=29", True),
        ("27 22 0:23 / /home rw - autofs /etc/auto.home rw,fd=5", False),
    ],
)
def test_what_has_to_be_asked_of_somebody_else_is_known_by_its_mount(
    mount: str, is_local: bool
) -> None:
    assert processes._is_local(mount.encode()) is is_local


def test_a_child_that_may_take_long_keeps_nothing_open_but_what_it_needs() -> None:
    other, kept = os.pipe(), os.pipe()
    gate = os.pipe()

    def body() -> None:
        os.write(kept[1], b"here")
        os.read(gate[0], 1)

    pid = processes.fork(body, keeps=(kept[1], gate[0]))
    try:
        assert os.read(kept[0], 4) == b"here"
        os.close(other[1])
        assert os.read(other[0], 1) == b"", "nobody else has it open"
    finally:
        os.write(gate[1], b".")
        os.waitpid(pid, 0)
        for one in (other[0], *kept, *gate):
            os.close(one)


@pytest.mark.parametrize("problem", [BlockingIOError(errno.EAGAIN, "no process is left"), None])
async def test_a_login_that_could_not_be_captured_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: OSError | None
) -> None:
    monkeypatch.setattr(system, "RUN", tmp_path)
    (tmp_path / "token").write_text("t")
    root = os.open(tmp_path, os.O_PATH)
    account, captured, now = system.Account("root", 0, 0, "/root", "/bin/sh", (0,)), [0], [100.0]

    async def capture(*_: object) -> dict[str, str] | None:
        captured[0] += 1
        return None if problem is not None and captured[0] == 1 else {"FROM": "profile"}

    monkeypatch.setattr(Context, "_capture_login", capture)
    monkeypatch.setattr("sandyard.server.guest.context.time.monotonic", lambda: now[0])
    try:
        context = Context(root)
        first = await context.login_environment(account)
        assert ("FROM" in first) is (problem is None)
        await context.login_environment(account)
        assert captured == [1]
        now[0] += 61
        assert (await context.login_environment(account))["FROM"] == "profile"
        now[0] += 1000
        assert (await context.login_environment(account))["FROM"] == "profile"
        assert captured == [1 if problem is None else 2]
    finally:
        os.close(root)


def test_who_tells_of_logins_and_no_more_of_those_that_ended(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    file = tmp_path / "run/utmp"
    try:
        file.write_bytes(b"left of another boot" * 100)
        utmp = Utmp()

        def who() -> list[list[str]]:
            said = subprocess.run(["who", file], capture_output=True, check=True, text=True)
            return [[line.split()[0], line.split()[1]] for line in said.stdout.splitlines()]

        pid = os.getpid()
        utmp.note_login(root, pid, "pts/0", "root", "192.0.2.1")
        utmp.note_login(root, pid, "pts/10", "dev", "")
        assert who() == [["root", "pts/0"], ["dev", "pts/10"]]
        utmp.note_logout(root, "pts/0")
        assert who() == [["dev", "pts/10"]]
        sessions = tmp_path / "run/systemd/sessions"
        (session,) = sessions.iterdir()
        assert session.name == "pts10"
        assert "USER=dev\n" in session.read_text()
        utmp.note_login(root, pid, "pts/3", "root", "x" * 1000)
        assert sorted(who()) == [["dev", "pts/10"], ["root", "pts/3"]]
        # What a guest puts there is not followed, and not waited for.
        for kind in ("link", "fifo", "folder", "nothing"):
            file.unlink(missing_ok=True)
            if kind == "link":
                (tmp_path / "secret").write_text("kept")
                file.symlink_to("../secret")
            elif kind == "fifo":
                os.mkfifo(file)
            elif kind == "folder":
                file.mkdir()
            utmp.note_login(root, pid, "pts/1", "root", "")
            if kind == "folder":
                file.rmdir()
        assert (tmp_path / "secret").read_text() == "kept"
        assert who() == [["root", "pts/1"]]
        # Where there is a systemd, its sessions are its own; a boot anew begins with none.
        left = {one.name for one in sessions.iterdir()}
        (tmp_path / "run/systemd/system").mkdir()
        Utmp().note_login(root, pid, "pts/7", "root", "")
        assert {one.name for one in sessions.iterdir()} == left
        (tmp_path / "run/systemd/system").rmdir()
        Utmp().note_login(root, pid, "pts/7", "root", "")
        assert {one.name for one in sessions.iterdir()} == {"pts7"}
        assert who() == [["root", "pts/7"]]
    finally:
        os.close(root)
