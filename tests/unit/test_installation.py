"""What an installation has on disk, and its log."""

import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.support.house import settings_of

from sandyard.server.app import logs
from sandyard.server.app.installation import only_server, running_server
from sandyard.server.app.wiring import check_home
from sandyard.server.core import wire
from sandyard.server.core.errors import UnavailableError
from sandyard.server.links.local import AgreedClock, SystemClock
from sandyard.server.node.host.identity import take_identity

# --- locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [2, -2])
def test_a_step_of_the_reference_is_followed_once_it_has_lasted_or_is_confirmed(
    hours: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, at = datetime(2026, 1, 2, tzinfo=UTC), 1000.0

    class Clock(AgreedClock):
        elapsed = staticmethod(lambda: at)

    clock, step = Clock(), timedelta(hours=hours)

    def after(seconds: float, ahead: timedelta) -> timedelta:
        """Read the reference again, and return by how much it is followed."""
        nonlocal at, moment
        at, moment = at + seconds, moment + timedelta(seconds=seconds)
        clock.agree(moment + ahead, at)
        return clock.now() - moment

    assert after(0, timedelta()) == timedelta()
    for _ in range(59):  # it is put right just in time
        assert after(5, step) == timedelta()
    assert clock.step == step
    assert caplog.text.count("sandyard admin confirm-clock") == 1
    assert after(5, timedelta(seconds=1)) == timedelta(seconds=1)
    assert clock.step is None
    # It is set again, and once more to something else.
    assert after(5, step) == timedelta(seconds=1)
    assert after(290, 2 * step) == timedelta(seconds=1)
    assert after(290, 2 * step) == timedelta(seconds=1)
    assert after(20, 2 * step) == 2 * step
    clock.follow()  # nothing waits for it
    assert after(5, step) == 2 * step
    clock.follow()
    assert after(5, step) == step


def test_only_its_owner_may_open_what_a_server_locks(tmp_path: Path) -> None:
    (tmp_path / "server.lock").touch(mode=0o644)  # as an earlier version left it
    with only_server(tmp_path):
        assert (tmp_path / "server.lock").stat().st_mode & 0o777 == 0o600
        assert running_server(tmp_path) == os.getpid()
        with pytest.raises(UnavailableError, match="another server uses"), only_server(tmp_path):
            pass
    assert running_server(tmp_path) is None


def test_a_clock_that_is_off_goes_by_the_other(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, hour = AgreedClock(), timedelta(hours=1)
    moment, at = datetime(2026, 1, 2, tzinfo=UTC), 1000.0
    monkeypatch.setattr(clock, "elapsed", lambda: at)
    clock.agree(moment, at)
    assert clock.now() == moment
    assert "this host's clock differs" in caplog.text
    at += 3600
    assert clock.now() == moment + hour, "whatever the host's own is set to"
    clock.agree(moment + timedelta(seconds=0.2), 1000.0)
    assert clock.now() == moment + hour, "it does not jump for nearly nothing"
    clock.agree(moment + hour - timedelta(seconds=50), at)
    assert clock.now() == moment + hour - timedelta(seconds=50)
    assert abs(AgreedClock().now() - SystemClock().now()) < timedelta(seconds=1)


def test_only_its_owner_may_open_the_registrys_lock(tmp_path: Path) -> None:
    take_identity(tmp_path / "home", routes=[], registry=tmp_path / "registry")
    assert (tmp_path / "registry/.lock").stat().st_mode & 0o777 == 0o600


def test_a_stranger_with_the_pid_of_a_server_is_not_taken_for_it(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "server.lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        stranger = subprocess.Popen(["sleep", "60"])
        try:
            for told in (f"{stranger.pid}\n", "nonsense", ""):
                (tmp_path / "server.pid").write_text(told)
                with pytest.raises(UnavailableError, match="cannot tell which process"):
                    running_server(tmp_path)
            assert stranger.poll() is None
        finally:
            stranger.kill()
            stranger.wait()
        (tmp_path / "server.pid").write_text(f"{holder.pid}\n")
        assert running_server(tmp_path) == holder.pid
    finally:
        holder.communicate()
    with (tmp_path / "server.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- the log --------------------------------------------------------------------------------------


@pytest.fixture
def root_log() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    kept, level = list(root.handlers), root.level
    yield root
    for handler in root.handlers:
        if handler not in kept:
            handler.close()
    root.handlers[:] = kept
    root.setLevel(level)


def test_lines_that_repeat_are_folded_and_counted(
    tmp_path: Path, root_log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("sandyard.server.app.logs.time.monotonic", lambda: now)
    file = tmp_path / "server.log"
    logs.set_up_logs(level="info", form="auto", file=file)
    log = logging.getLogger("a.b")
    for number in range(1000):
        log.warning("too many open: %d", number)
        log.warning("something else") if number == 500 else None
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["message"] for one in lines[:2]] == ["too many open: 0", "too many open: 1"]
    assert len(lines) == 101
    assert any(one["message"] == "something else" for one in lines)
    now += 11
    log.warning("too many open: again")
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["message"], last["left_out"]) == ("too many open: again", 900)


def test_what_asyncio_says_of_tls_streams_that_close_is_left_out(
    tmp_path: Path, root_log: logging.Logger
) -> None:
    file = tmp_path / "server.log"
    logs.set_up_logs(level="info", form="auto", file=file)
    log = logging.getLogger("asyncio")
    log.warning("returning true from eof_received() has no effect when using ssl")
    log.warning("socket.send() raised exception.")
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["message"] == "socket.send() raised exception."


def test_the_log_is_private_and_begun_anew_at_its_size(
    tmp_path: Path, root_log: logging.Logger
) -> None:
    file = tmp_path / "server.log"
    file.touch(mode=0o644)
    logs.set_up_logs(level="info", form="json", file=file, file_mib=1)
    for number in range(60):
        logging.getLogger(f"one.{number}").info("x" * 100_000)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["server.log", "server.log.1", "server.log.2"]
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 2**20 + 200_000
        assert path.stat().st_mode & 0o777 == 0o640


# --- what a guest says ---------------------------------------------------------------------------


def test_what_a_guest_says_moves_no_cursor_and_fits_every_database() -> None:
    said = "bad\x1b[2J\r\n\x00\x9b\u202e\ud800 news"
    line = json.dumps({"v": 1, "ok": False, "error": "x\x00", "message": said}) + "\n"
    decoder = wire.Decoder()
    decoder.feed(line.encode())
    answer = decoder.take_answer()
    assert answer is not None
    assert answer.message == "bad\ufffd[2J\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd news"
    assert answer.error == "x\ufffd"


async def test_only_root_starts_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnavailableError, match="root is needed; run it with sudo"):
        await check_home(settings_of(tmp_path, driver="auto"))
    await check_home(settings_of(tmp_path))
