"""What tells a guest that has halted from one that lives."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.server import wait_until

from sandyard.server.drivers import ends
from sandyard.server.drivers.ends import Standstill, end_of_guest, says_halted

HALTED = b"[   12.3] reboot: System halted\r\n"


@pytest.mark.parametrize(
    ("console", "expected"),
    [
        (HALTED, True),
        (b"a\n" + HALTED, True),
        (b"reboot: Power off not available: System halted instead\r\n", True),
        (b"reboot: System halted", True),
        (HALTED + b"login: ", False),
        (b"reboot: Power down\n", False),
        (b"x" * 100_000 + HALTED, True),
        (b"\xff\xfe", False),
        (b"", False),
    ],
)
def test_only_the_last_words_say_that_a_guest_has_halted(console: bytes, expected: bool) -> None:
    assert says_halted(console) is expected
    end = end_of_guest(console)
    assert not expected or (end is not None and end.code == "powered_off")


class Echo:
    """A process that runs when it is spoken to and at no other time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.pid = self._process.pid

    def speak(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"x")
        assert self._process.stdout.read(1) == b"x"
        wait_until(lambda: self._state() == "S", limit_s=10)

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.end()


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ends, "time", made)
    return made


def test_what_does_not_run_stands_still_and_what_ran_in_between_does_not(
    echo: Echo, clock: Clock
) -> None:
    echo.speak()
    still = Standstill()
    assert not still.is_found(echo.pid, [echo.pid])
    clock.now += 0.9
    assert not still.is_found(echo.pid, [echo.pid]), "it may be about to run"
    clock.now += 0.2
    assert still.is_found(echo.pid, [echo.pid])
    echo.speak()
    assert not still.is_found(echo.pid, [echo.pid]), "it ran in between"
    clock.now += 0.9
    assert not still.is_found(echo.pid, [echo.pid])
    echo.end()
    for _ in range(2):
        clock.now += 10
        assert not still.is_found(echo.pid, [echo.pid]), "of what is gone nothing is known"


def test_one_processor_that_runs_is_enough_and_none_tells_nothing(echo: Echo, clock: Clock) -> None:
    ends_now = threading.Event()

    def turn() -> None:
        while not ends_now.is_set():
            pass

    turning = threading.Thread(target=turn)
    sleeping = threading.Thread(target=ends_now.wait)
    turning.start()
    sleeping.start()
    try:
        still, none = Standstill(), Standstill()
        assert turning.native_id is not None
        assert sleeping.native_id is not None
        for _ in range(3):
            clock.now += 10
            assert not still.is_found(os.getpid(), [sleeping.native_id, turning.native_id])
            assert not none.is_found(os.getpid(), [])
    finally:
        ends_now.set()
        turning.join()
        sleeping.join()
