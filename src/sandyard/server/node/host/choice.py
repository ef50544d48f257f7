"""Selects the driver of this host: the first one under which a probe machine boots.

The existence of a device proves nothing: on some hosts /dev/kvm can be opened, but no ordinary
kernel runs in its machines. A probe machine is therefore booted once, and its result is kept until
the hypervisor, guest kernel or host kernel changes.
"""

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sandyard.server.core.errors import UnavailableError
from sandyard.server.drivers.contract import Driver, ProbeSpec, SavingDriver, Verdict
from sandyard.server.drivers.kvm import NO_KVM
from sandyard.server.node.images.image import Image

log = logging.getLogger(__name__)

_USUAL_S = 5.0
"""How long a probe machine may take on a host for which the limits of machines are made: an idle
one that emulates."""
_OWN_KERNEL = 6.0
_AGAIN_S = 30.0
_CLOSED = (NO_KVM, "Could not access KVM")
"""What was found of a device that may have been opened since."""


class _Kept(NamedTuple):
    """A saved verdict; an earlier version saved only the first two fields."""

    is_usable: bool
    reason: str
    took_s: float | None = None
    limit_s: float = 20.0


@dataclass(frozen=True)
class Judged:
    """A driver with its verdict."""

    driver: Driver
    verdict: Verdict


class Drivers:
    """The drivers a node may use, best first; existing machines may use any `known` one.

    `probe_s` is the time limit for a probe of a distribution's kernel, `slowest` limits `pace`.
    """

    def __init__(
        self,
        candidates: Sequence[Driver],
        *,
        cache: Path,
        known: Sequence[Driver] = (),
        probe_s: float = 20.0,
        slowest: float = 20.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._probe_s = probe_s
        self._slowest = slowest
        self._kept_pace: float | None = None
        self._took: dict[str, float] = {}
        self._refused: dict[str, tuple[float, UnavailableError]] = {}
        self._candidates = tuple(candidates)
        self._known = (*candidates, *known)
        self._judging = asyncio.Lock()
        self._cache = cache
        self._chosen: dict[str, Driver] = {}

    @property
    def pace(self) -> float:
        """How many times longer than usual guests take on this host, at least 1, as measured by
        probes.

        It is the slowest of the images for which a driver was chosen since this process started, or
        of all saved verdicts if there was none.
        """
        if self._took:
            return self._paced(self._took.values())
        if self._kept_pace is None:
            release = f"host {os.uname().release}"
            self._kept_pace = self._paced(
                kept.took_s
                for key, kept in self._load().items()
                if kept.is_usable and key.endswith(release)
            )
        return self._kept_pace

    def _paced(self, took: Iterable[float | None]) -> float:
        slowest = max((one for one in took if one is not None), default=0.0)
        return min(self._slowest, max(1.0, slowest / _USUAL_S))

    def named(self, name: str) -> Driver | None:
        """Return the driver of that name."""
        return next((driver for driver in self._known if driver.name == name), None)

    async def versions_of(self, name: str) -> Sequence[str]:
        """Return the versions of a driver that restore what they saved; none if it is not here."""
        driver = self.named(name)
        if driver is None or not driver.capabilities.saves:
            return ()
        saver: SavingDriver = driver  # type: ignore[assignment]  # as it says of itself
        try:
            return await saver.versions()
        except UnavailableError:
            return ()

    async def choose(self, image: Image) -> Driver:
        """Return the best driver that boots this image's kernel here.

        Raises:
            UnavailableError: there is none; the message gives the reason for each driver.
        """
        if (chosen := self._known_choice(image)) is not None:
            return chosen
        # One at a time: concurrent probes slow each other down until none succeeds.
        async with self._judging:
            return self._known_choice(image) or await self._choose(image)

    def _known_choice(self, image: Image) -> Driver | None:
        """Return the driver chosen before; raise a recent failure again."""
        at, error = self._refused.get(_kernel_of(image), (0.0, None))
        if error is not None and self._monotonic() - at < _AGAIN_S:
            raise UnavailableError(error.message)
        return self._chosen.get(_kernel_of(image))

    async def _choose(self, image: Image) -> Driver:
        judged = await self.judge(image)
        chosen = next((one for one in judged if one.verdict.is_usable), None)
        if chosen is None:
            reasons = "; ".join(f"{one.driver.name}: {one.verdict.reason}" for one in judged)
            error = UnavailableError(f"cannot start machines on this host: {reasons}")
            self._refused[_kernel_of(image)] = (self._monotonic(), error)
            raise error
        for one in judged:
            if not one.verdict.is_usable:
                log.warning(
                    "the driver %s cannot be used on this host: %s",
                    one.driver.name,
                    one.verdict.reason,
                )
        log.info("machines are started with %s", chosen.driver.name)
        self._chosen[_kernel_of(image)] = chosen.driver
        if chosen.verdict.took_s is not None:
            self._took[_kernel_of(image)] = chosen.verdict.took_s
        return chosen.driver

    async def judge(self, image: Image) -> list[Judged]:
        """Return the verdict on each driver up to the first usable one, from the cache if known."""
        judged = []
        for driver in self._candidates:
            verdict = await self._verdict(driver, image)
            judged.append(Judged(driver, verdict))
            if verdict.is_usable:
                break
        return judged

    async def _verdict(self, driver: Driver, image: Image) -> Verdict:
        try:
            version = await driver.version()
        except UnavailableError as error:
            return Verdict(False, error.message)
        key = f"{driver.name} {version} image {_kernel_of(image)} host {os.uname().release}"
        # A kernel that was configured is known to boot, if slowly; others get only a few seconds.
        limit_s = self._probe_s * (_OWN_KERNEL if image.has_own_kernel else 1)
        known = self._load().get(key)
        # One that timed out may only need more time.
        if known is not None and (known.is_usable or known.limit_s >= limit_s):
            return Verdict(known.is_usable, known.reason, took_s=known.took_s)
        with tempfile.TemporaryDirectory(prefix="sandyard-probe-") as scratch:
            spec = ProbeSpec(
                kernel=image.kernel,
                initrd=image.initrd,
                scratch=Path(scratch),
                limit_s=limit_s,
                arguments=image.arguments,
                has_acpi=image.has_acpi,
            )
            verdict = await driver.probe(spec)
        if verdict.is_certain:
            kept = _Kept(verdict.is_usable, verdict.reason, verdict.took_s, limit_s)
            self._save({**self._load(), key: kept})
        return verdict

    def _load(self) -> dict[str, _Kept]:
        try:
            known = json.loads(self._cache.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        found = {}
        for key, kept in known.items():
            with suppress(TypeError):
                one = _Kept(*kept)
                if one.is_usable or not any(closed in one.reason for closed in _CLOSED):
                    found[key] = one
        return found

    def _save(self, known: dict[str, _Kept]) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        part = self._cache.with_name(self._cache.name + ".part")
        part.write_text(json.dumps(known, indent=1))
        part.replace(self._cache)


def _kernel_of(image: Image) -> str:
    """Return the digest of the image whose kernel another one boots with: its own, or the
    runtime of a version."""
    return image.inputs.get("runtime", image.digest)
