"""What the agent knows of its machine: what the host sent, and what it measured.

What the host told it (token, environment) is stored in a tmpfs that only root can read, so that PID
1 may restart the agent at any time.
"""

import asyncio
import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sandyard.server.core import ops, wire
from sandyard.server.guest import patience, processes, system
from sandyard.server.guest.callers import Callers
from sandyard.server.guest.patience import patient
from sandyard.server.guest.repeats import Repeats
from sandyard.server.guest.starts import Starts
from sandyard.server.guest.streams import Reader
from sandyard.server.guest.system import Account, RefusedError
from sandyard.server.guest.table import Table
from sandyard.server.guest.utmp import Utmp

SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh")
_TOOLS_SHELL = ("/run/sandyard/tools/usr/bin/busybox", "sh")
_LOGIN_LIMIT_S = 5.0
_CAPTURE_AGAIN_S, _CAPTURE_AGAIN_MAX_S = 60.0, 3600.0
_SAMPLE_PERIOD_S = 5.0
_SAMPLES = 13  # a minute of them
_HISTORY_PERIOD_S = 15.0
_HISTORY = 240  # an hour of them
_LEAST_S = 0.5
"""The shortest time to measure over: the kernel counts in ticks of 4 or 10 ms."""


def shell_programs(shells: Sequence[str], *arguments: str) -> list[tuple[str, ...]]:
    """Return the programs to try for a shell; the last one is ours, for images without any."""
    return [*((shell, *arguments) for shell in shells), (*_TOOLS_SHELL, *arguments)]


class Load:
    """The CPU usage of the machine; 100 is one whole CPU, whatever its shape."""

    def __init__(self) -> None:
        self._cpu = (time.monotonic(), system.cpu_ticks())
        self._work = collections.deque([_work_done()], maxlen=_SAMPLES)

    async def sample(self) -> None:
        """Take samples forever."""
        while True:
            await asyncio.sleep(_SAMPLE_PERIOD_S)
            self._work.append(_work_done())

    def forget(self) -> None:
        """Start anew at the next sample: the machine was suspended, or belongs to another sandbox.

        Not now, because the host waits for the machine, and a sample takes a slow one 16 ms.
        """
        self._work.clear()

    async def recent_percent(self, window_s: float) -> float:
        """Return the recent CPU usage of users' programs. If there is no sample from before this
        moment, measure for a while now: a busy machine must not be taken for an idle one."""
        now, work = _work_done()
        if not self._work:
            self._work.append((now, work))
        then, before = next((one for one in self._work if now - one[0] <= window_s), self._work[-1])
        if now - then < _LEAST_S:
            await asyncio.sleep(then + _LEAST_S - now)
            now, work = _work_done()
        elapsed = now - then
        return round(100.0 * max(0.0, work - before) / elapsed, 2) if elapsed > 0 else 0.0

    async def percent_now(self) -> float:
        """Return the CPU usage now, the agent's own included."""
        then, (busy, total) = self._cpu
        if time.monotonic() - then > 2.0:
            busy, total = system.cpu_ticks()
            await asyncio.sleep(0.2)
        busy_now, total_now = system.cpu_ticks()
        self._cpu = (time.monotonic(), (busy_now, total_now))
        share = (busy_now - busy) / (total_now - total) if total_now > total else 0.0
        return round(100.0 * share * (os.cpu_count() or 1), 2)


class History:
    """Samples of the machine's resource usage, of the last hour."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self.samples: collections.deque[ops.Sample] = collections.deque(maxlen=_HISTORY)

    async def sample(self) -> None:
        """Take samples forever."""
        busy, total = system.cpu_ticks()
        while True:
            await asyncio.sleep(_HISTORY_PERIOD_S)
            (busy_now, total_now), figures = system.cpu_ticks(), system.stats(self._root_fd)
            share = (busy_now - busy) / (total_now - total) if total_now > total else 0.0
            busy, total = busy_now, total_now
            del figures["uptime"]
            self.samples.append(
                ops.Sample(
                    at_ms=round(time.time() * 1000),
                    cpu_percent=round(100.0 * max(0.0, share) * (os.cpu_count() or 1), 2),
                    **figures,
                )
            )


@dataclass(frozen=True)
class _Login:
    """The environment of a login, and the `stamp` of the profile files it was captured from."""

    stamp: tuple[object, ...]
    env: dict[str, str]
    good_until: float
    again_s: float = 0.0


class Context:
    """The state of one agent."""

    def __init__(self, root_fd: int) -> None:
        self.root_fd = root_fd
        self.load = Load()
        self.history = History(root_fd)
        self.table = Table()
        self.callers = Callers()
        self.starts = Starts()
        self.repeats = Repeats()
        self.utmp = Utmp()
        self.token = (system.RUN / "token").read_text().strip()
        self.env: Mapping[str, str] = {}
        self._logins: dict[int, _Login] = {}
        self._capturing: dict[int, asyncio.Lock] = {}
        with contextlib.suppress(FileNotFoundError):
            state, _ = json.JSONDecoder().raw_decode((system.RUN / "state").read_text())
            self.token, self.env = state["token"], state["env"]
            patience.go_by(state.get("pace"))  # an older agent wrote none

    def remember(self, *, token: str, env: Mapping[str, str], pace: float | None) -> None:
        """Adopt what the host sent, and store it for a restart of the agent."""
        self.token, self.env = token, dict(env)
        patience.go_by(pace)
        # The code interpreter of templates/ reads `env` here.
        state = {"token": token, "env": self.env, "pace": pace}
        system.write_private("state", json.dumps(state))

    async def login_environment(self, account: Account) -> dict[str, str]:
        """Return the environment of a login, captured again when a profile file has changed."""
        stamp = system.profile_stamp(self.root_fd, account)
        async with self._capturing.setdefault(account.uid, asyncio.Lock()):
            known = self._logins.get(account.uid)
            if known is None or known.stamp != stamp or time.monotonic() >= known.good_until:
                known = await self._login(account, stamp, known)
                self._logins[account.uid] = known
        return dict(known.env)

    async def _login(
        self, account: Account, stamp: tuple[object, ...], before: _Login | None
    ) -> _Login:
        plain = system.plain_environment(account) | system.system_environment(self.root_fd)
        captured = await self._capture_login(account, plain)
        if captured is not None:
            return _Login(stamp, plain | captured, math.inf)
        # Each time it fails it is left alone for longer: it may hang for as long as it is waited
        # for.
        again_s = _CAPTURE_AGAIN_S
        if before is not None and before.stamp == stamp:
            again_s = min(2 * before.again_s, _CAPTURE_AGAIN_MAX_S)
        return _Login(stamp, plain, time.monotonic() + again_s, again_s)

    async def _capture_login(
        self, account: Account, plain: dict[str, str]
    ) -> dict[str, str] | None:
        """Return the environment of a login, or None if a profile hangs or fails. That must not
        prevent commands: the plain environment is used for a while."""
        spec = processes.Spec(
            name=SHELLS[0],
            programs=shell_programs(SHELLS, "-l", "-c", "exec env -0"),
            env=plain,
            cwd="/",
            account=account,
        )
        try:
            process = await processes.start(spec, root_fd=self.root_fd, wants_stdin=False)
        except RefusedError:
            return None
        assert process.stdout is not None  # it was started on pipes
        assert process.stderr is not None
        stdout, stderr = Reader(process.stdout), Reader(process.stderr)
        try:
            async with asyncio.timeout(patient(_LOGIN_LIMIT_S)), asyncio.TaskGroup() as tasks:
                dump = tasks.create_task(stdout.read_all(wire.HEAD_MAX))
                tasks.create_task(stderr.read_all(wire.HEAD_MAX))
                # Not the pipes' end: a background job of the profile may hold them for ever.
                await process.wait()
                stdout.finish()
                stderr.finish()
        except TimeoutError:
            process.kill()
            await process.wait()
            return None
        finally:
            stdout.close()
            stderr.close()
            process.kill()
            process.release()
        return system.parse_environment(dump.result())


def _work_done() -> tuple[float, float]:
    """Return the time, and the CPU seconds used since boot by everything but this agent."""
    busy, _ = system.cpu_ticks()
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK") - time.process_time()
