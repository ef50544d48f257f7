"""What file servers can do is found out by using one, whatever their library's digest says."""

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.node.exports import self_test, server
from sandyard.server.node.exports.library import Feature, library_of, version_of
from sandyard.server.node.exports.self_test import missing_by_test
from sandyard.server.node.host.identity import give_back_identity, take_identity
from sandyard.server.node.host.network import Slots, host_routes, remove_host_rules
from sandyard.server.tasks import Crew

pytestmark = [pytest.mark.root]


@asynccontextmanager
async def slots(home: Path) -> AsyncIterator[Slots]:
    """The network of an installation of the test's own."""
    home.chmod(0o755)
    identity = take_identity(home, routes=await host_routes())
    made = Slots(identity, home=home)
    async with AsyncExitStack() as held:
        held.callback(give_back_identity, home)
        held.push_async_callback(remove_host_rules, identity)
        async with Crew() as crew:
            await made.open(in_use=[], crew=crew)
            try:
                yield made
            finally:
                await made.close()


def left(home: Path) -> list[str]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout
    exports = home / "exports"
    found = [str(one) for one in exports.iterdir()] if exports.is_dir() else []
    found += [line for line in (*mounts, *loops.splitlines()) if str(home) in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.parent.name != str(os.getpid()) and str(home).encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


async def test_the_file_servers_of_this_host_do_all_that_is_tested(tmp_path: Path) -> None:
    async with slots(tmp_path) as network:
        assert await missing_by_test(tmp_path / "exports", network) == ()
    assert left(tmp_path) == []


async def test_without_patches_the_test_finds_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "patched", lambda library: library)
    expected = {Feature.LOCKS}
    if version_of(library_of()) in ("6.5", "6.6"):
        expected.add(Feature.WAITING)
    if version_of(library_of()) in ("6.4", "6.5"):
        expected.add(Feature.REOPENED)
    async with slots(tmp_path) as network:
        assert set(await missing_by_test(tmp_path / "exports", network)) == expected
    assert left(tmp_path) == []


async def test_a_test_that_fails_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with slots(tmp_path) as network:
        with monkeypatch.context() as patch:
            patch.setattr(self_test, "_SIZE", "no size")
            with pytest.raises(InternalError, match="mke2fs"):
                await missing_by_test(tmp_path / "exports", network)
        with monkeypatch.context() as patch:
            patch.setattr(server, "_VIEW", "exit 3")
            with pytest.raises(UnavailableError, match="file server"):
                await missing_by_test(tmp_path / "exports", network)
        assert await missing_by_test(tmp_path / "exports", network) == ()
    assert left(tmp_path) == []
