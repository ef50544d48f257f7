"""Starts that go wrong, on real machines; and builds that fail."""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.images import cached_settings, minimal_image
from tests.support.ports import free_port
from tests.support.server import COLD, RealServer, wait_until

from sandyard.server.app.wiring import builder_of, images_of
from sandyard.server.core.contracts.node import TemplateStatus
from sandyard.server.core.errors import InternalError
from sandyard.server.node.images.build import Builder, BuildOptions
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.versions import Versions

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def cold(hypervisor: dict[str, str]) -> Iterator[RealServer]:
    made = RealServer(free_port(), **hypervisor, **COLD)
    try:
        made.start()
        yield made
    finally:
        made.remove()


def test_a_machine_that_dies_while_it_boots_fails_with_the_reason(cold: RealServer) -> None:
    box = cold.create(wait=0)["id"]
    wait_until(lambda: bool(cold.record_of(box).get("handle")), what="it boots")
    os.kill(cold.pid_of(box), signal.SIGKILL)
    wait_until(lambda: cold.get(box)["status"] == "failed", limit_s=10)
    reason = cold.get(box)["statusReason"]
    assert isinstance(reason, dict)
    assert reason["code"] == "start_failed"
    assert "ended while it started" in reason["message"]
    assert not cold.record_of(box)


def test_a_delete_while_it_boots_leaves_nothing(cold: RealServer) -> None:
    box = cold.create(wait=0)["id"]
    wait_until(lambda: bool(cold.record_of(box).get("handle")), what="it boots")
    cold.delete(box)
    assert str(box) not in cold.machines()
    assert not cold.processes()


async def test_a_build_that_fails_leaves_the_image_in_use(tmp_path: Path) -> None:
    image = minimal_image()
    settings = cached_settings(tmp_path)
    whole = images_of(settings)
    broken = replace(
        whole.definitions["base-minimal"], packages=("no-such-package-at-all",), digest="broken"
    )
    images = Images(
        definitions={"base-minimal": broken},
        images_dir=settings.images_dir,
        templates_dir=tmp_path / "templates",
        versions=Versions(tmp_path / "versions"),
    )
    images.use("base-minimal", image.digest)
    builder = Builder(
        images, BuildOptions(cache_dir=tmp_path / "cache", logs_dir=tmp_path / "builds")
    )
    with pytest.raises(InternalError, match=r"no-such-package-at-all|mmdebstrap"):
        await builder.build("base-minimal", progress=lambda _: None)
    assert images.get("base-minimal")[1] == image
    (fact,) = images.facts()
    assert fact.status is TemplateStatus.READY
    assert fact.error
    assert "no-such-package-at-all" in (tmp_path / "builds/base-minimal.log").read_text()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


async def test_what_is_up_to_date_is_not_built_again(tmp_path: Path) -> None:
    image = minimal_image()
    steps: list[str] = []
    built = await builder_of(cached_settings(tmp_path)).build("base-minimal", progress=steps.append)
    assert built.digest == image.digest
    assert steps == ["base-minimal is up to date"]


def test_a_hypervisor_writes_nowhere_but_where_it_has_to(server: RealServer, box: str) -> None:
    if server.environment.get("SANDYARD_NODE__DRIVER") == "firecracker":
        pytest.skip("that its jail holds nothing else is shown by the exam of its driver")
    pid = server.pid_of(box)
    uid = Path(f"/proc/{pid}").stat().st_uid
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    known = {b"PATH", b"LC_ALL", b"MALLOC_ARENA_MAX"}
    assert {one.partition(b"=")[0] for one in environment if one} <= known

    def may_write(folder: object, *view: str) -> bool:
        name = f"{folder}/by-a-hypervisor"
        line = f"echo x > {name} && rm {name}"
        command = ["setpriv", "--reuid", str(uid), "--clear-groups", "sh", "-c", line]
        return subprocess.run([*view, *command], capture_output=True, check=False).returncode == 0

    inside = ("nsenter", f"--mount=/proc/{pid}/ns/mnt", "--")
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        assert may_write(folder), "the test would pass without any namespace"
        assert not may_write(folder, *inside)
    assert may_write(server.folder_of(box) / "run", *inside)
