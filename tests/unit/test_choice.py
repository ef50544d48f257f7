"""Which driver is chosen, what is remembered of that, and how patient a node is because of it."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandyard.server.core.errors import UnavailableError
from sandyard.server.drivers.contract import Verdict
from sandyard.server.drivers.fake import FakeDriver, FakeHost
from sandyard.server.node.host.choice import Drivers
from sandyard.server.node.images.images import Image


@dataclass
class Probed(FakeDriver):
    """A driver whose probe has the outcome that it is told, and notes its limit."""

    verdict: Verdict
    name: str = "probed"
    limits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(FakeHost())

    async def probe(
        self, *, kernel: Path, initrd: Path, scratch: Path, limit_s: float, arguments: str = ""
    ) -> Verdict:
        self.limits.append(limit_s)
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
    slow = Probed(Verdict(True, "yes", took_s=10.0), name="slow")
    drivers = Drivers([unused, slow], cache=tmp_path / "verdicts.json")
    await drivers.choose(image())
    assert drivers.pace == 2
    slow.verdict = replace(slow.verdict, took_s=15.0)
    await drivers.choose(image("another"))
    assert drivers.pace == 3


async def test_a_kernel_of_ones_own_is_waited_for_longer(tmp_path: Path) -> None:
    driver = Probed(Verdict(False, "no", is_certain=False))
    drivers = Drivers([driver], cache=tmp_path / "verdicts.json", probe_s=7)
    for kernel in ("", "own"):
        with pytest.raises(UnavailableError, match="probed: no"):
            await drivers.choose(image(kernel))
    assert driver.limits == [7, 42]


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
