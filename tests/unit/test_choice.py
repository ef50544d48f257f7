"""Which driver is chosen, what is remembered of that, and how patient a node is because of it."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandyard.server.core.errors import UnavailableError
from sandyard.server.drivers.contract import ProbeSpec, Verdict
from sandyard.server.drivers.kvm import NO_KVM
from sandyard.server.fakes.driver import FakeDriver, FakeHost
from sandyard.server.node.host.choice import Drivers
from sandyard.server.node.images.image import Image


@dataclass
class Probed(FakeDriver):
    """A driver whose probe has the outcome that it is told, and notes its limit."""

    verdict: Verdict
    name: str = "probed"
    limits: list[float] = field(default_factory=list)
    gate: asyncio.Event | None = None

    def __post_init__(self) -> None:
        super().__init__(FakeHost())

    async def probe(self, spec: ProbeSpec) -> Verdict:
        self.limits.append(spec.limit_s)
        if self.gate is not None:
            await self.gate.wait()
        return self.verdict


def image(kernel: str = "") -> Image:
    return Image(
        digest=f"image-{kernel}",
        folder=Path("/i"),
        os="None",
        size_bytes=0,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        inputs={"kernel": kernel},
    )


@pytest.mark.parametrize(
    ("took_s", "slowest", "pace"),
    [(None, 20, 1), (0.1, 20, 1), (5, 20, 1), (12.5, 20, 2.5), (500, 20, 20), (12.5, 1, 1)],
)
async def test_a_node_is_as_patient_as_its_probe_machine_was_slow(
    tmp_path: Path, took_s: float | None, slowest: float, pace: float
) -> None:
    driver = Probed(Verdict(True, "it boots", took_s=took_s))
    drivers = Drivers([driver], cache=tmp_path / "verdicts.json", slowest=slowest)
    assert drivers.pace == 1
    assert await drivers.choose(image()) is driver
    assert drivers.pace == pace
    # The next server knows without another probe.
    later = Drivers([driver], cache=tmp_path / "verdicts.json", slowest=slowest)
    assert later.pace == pace
    await later.choose(image())
    assert len(driver.limits) == 1


async def test_the_slowest_that_is_used_decides_and_one_that_is_not_used_does_not(
    tmp_path: Path,
) -> None:
    unused = Probed(Verdict(False, "no", took_s=90.0), name="unused")
    slow = Probed(Verdict(True, "yes", took_s=15.0), name="slow")
    cache = tmp_path / "verdicts.json"
    drivers = Drivers([unused, slow], cache=cache)
    await drivers.choose(image())
    assert drivers.pace == 3
    slow.verdict = replace(slow.verdict, took_s=10.0)
    await drivers.choose(image("another"))
    assert drivers.pace == 3
    # What is remembered of an image that nobody uses any more says nothing.
    later = Drivers([unused, slow], cache=cache)
    assert later.pace == 3
    await later.choose(image("another"))
    assert later.pace == 2


async def test_a_kernel_of_ones_own_is_waited_for_longer(tmp_path: Path) -> None:
    driver = Probed(Verdict(False, "no", is_certain=False))
    drivers = Drivers([driver], cache=tmp_path / "verdicts.json", probe_s=7)
    for kernel in ("", "own"):
        with pytest.raises(UnavailableError, match="probed: no"):
            await drivers.choose(image(kernel))
    assert driver.limits == [7, 42]
    # Whoever asks again at once is told the same, without another probe.
    with pytest.raises(UnavailableError, match="probed: no"):
        await drivers.choose(image("own"))
    assert driver.limits == [7, 42]


async def test_one_that_did_not_come_up_is_tried_again_with_more_time_alone(tmp_path: Path) -> None:
    driver = Probed(Verdict(False, "no"))
    for probe_s, probed in ((7, 1), (7, 1), (5, 1), (9, 2), (8, 2)):
        drivers = Drivers([driver], cache=tmp_path / "verdicts.json", probe_s=probe_s)
        with pytest.raises(UnavailableError):
            await drivers.choose(image())
        assert len(driver.limits) == probed


@pytest.mark.parametrize(
    "reason", [NO_KVM, "qemu: -accel kvm: Could not access KVM kernel module: Permission denied"]
)
async def test_a_closed_device_is_looked_at_again(tmp_path: Path, reason: str) -> None:
    cache = tmp_path / "verdicts.json"
    key = f"probed 1 image {image().digest} host {os.uname().release}"
    cache.write_text(json.dumps({key: [False, reason, None, 99.0]}))
    driver = Probed(Verdict(True, "yes"))
    assert await Drivers([driver], cache=cache).choose(image()) is driver


async def test_one_that_is_chosen_is_not_kept_waiting_by_anothers_probe(tmp_path: Path) -> None:
    driver = Probed(Verdict(True, "yes"))
    drivers = Drivers([driver], cache=tmp_path / "verdicts.json")
    await drivers.choose(image())
    driver.gate = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(drivers.choose(image("slow")))
        async with asyncio.timeout(5):
            while len(driver.limits) < 2:
                await asyncio.sleep(0)
            assert await drivers.choose(image()) is driver
        driver.gate.set()


@pytest.mark.parametrize(
    "kept", ["{", "[]", '{"probed": 7}', '{"probed 1 image x host y": [true, "as it was"]}']
)
async def test_verdicts_that_an_earlier_version_kept_are_no_trouble(
    tmp_path: Path, kept: str
) -> None:
    (tmp_path / "verdicts.json").write_text(kept)
    driver = Probed(Verdict(True, "it boots", took_s=10.0))
    drivers = Drivers([driver], cache=tmp_path / "verdicts.json")
    assert drivers.pace == 1
    assert await drivers.choose(image()) is driver
    assert drivers.pace == 2


def test_a_server_with_machines_loads_no_fakes() -> None:
    look = "import sandyard.server.app.serve, sys; print('sandyard.server.fakes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
