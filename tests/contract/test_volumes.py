"""What is promised of the volumes that workspaces lie in, by each that there is."""

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.ids import new_uuid
from sandyard.server.links import volumes as volumes_of_images
from sandyard.server.links.volumes import FolderVolumes, ImageVolumes
from sandyard.server.node.host.mounts import make_mounts, mounts_of, remove_mounts

QUOTA = 32 * 2**20
Kind = FolderVolumes | ImageVolumes
KINDS: dict[str, type[Kind]] = {"folders": FolderVolumes, "images": ImageVolumes}


def mounted(place: Path) -> bool:
    return str(place) in Path("/proc/self/mounts").read_text()


@pytest.fixture(params=["folders", pytest.param("images", marks=pytest.mark.root)])
async def volumes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kind]:
    made = KINDS[request.param](tmp_path / "volumes")
    yield made
    await made.close()
    assert not mounted(tmp_path)


@pytest.fixture
async def images(tmp_path: Path) -> AsyncIterator[ImageVolumes]:
    made = ImageVolumes(tmp_path / "volumes")
    yield made
    await made.close()
    assert not mounted(tmp_path)


async def test_what_is_in_a_volume_stays_until_it_is_removed(volumes: Kind, tmp_path: Path) -> None:
    one, other = new_uuid(), new_uuid()
    assert (await volumes.use_of(one, QUOTA)).used_bytes == 0
    async with volumes.open(one, QUOTA) as place, volumes.open(one, QUOTA) as same:
        assert place == same
        assert os.listdir(place) == []
        assert place.stat().st_mode & 0o7777 == 0o2775
        (place / "kept").write_bytes(b"x" * 100_000)
        assert await volumes.stuck([one, other]) == []
    async with volumes.open(other, QUOTA) as place:
        assert os.listdir(place) == []
    use = await volumes.use_of(one, QUOTA)
    assert 100_000 <= use.used_bytes < 120_000
    assert use.quota_bytes == QUOTA
    assert use.host_bytes > 0
    await volumes.rest()
    # Another process, after this one has ended in whatever way.
    again = type(volumes)(tmp_path / "volumes")
    async with again.open(one, QUOTA) as place:
        assert (place / "kept").read_bytes() == b"x" * 100_000
    await again.remove(one)
    await again.remove(one)
    assert (await again.use_of(one, QUOTA)).used_bytes == 0
    assert one not in "".join(os.listdir(tmp_path / "volumes"))
    await again.close()


@pytest.mark.root
@pytest.mark.parametrize(
    ("quota_gib", "files"), [(0.6, 150_000), (4, 1_000_000), (10, 1_300_000), (40, 2_600_000)]
)
async def test_a_volume_has_room_for_many_files_and_all_of_its_bytes(
    images: ImageVolumes, quota_gib: float, files: int
) -> None:
    quota = int(quota_gib * 2**30)
    async with images.open(new_uuid(), quota) as place:
        found = os.statvfs(place)
        assert found.f_files >= files
        assert quota <= found.f_bfree * found.f_frsize <= quota * 1.05 + 32 * 2**20


@pytest.mark.root
async def test_the_kernel_keeps_a_file_system_to_its_size(images: ImageVolumes) -> None:
    one = new_uuid()
    async with images.open(one, QUOTA) as place:
        with (
            pytest.raises(OSError, match="No space left") as caught,
            (place / "f").open("wb", buffering=0) as file,
        ):
            while True:
                file.write(bytes(2**20))
        assert caught.value.errno == errno.ENOSPC
        assert QUOTA <= (place / "f").stat().st_size < QUOTA * 1.1
        # Devices and setuid mean nothing in it.
        os.mknod(place / "null", 0o20666, os.makedev(1, 3))
        with pytest.raises(PermissionError):
            (place / "null").read_bytes()
        options = next(
            line.split()[3]
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if line.split()[1] == str(place)
        ).split(",")
        assert {"nosuid", "nodev"} <= set(options)
        with pytest.raises(UnavailableError):
            await images.remove(one)
        with (place / "f").open("rb"):
            await images.close()
            assert mounted(place)
    await images.remove(one)
    assert list(place.parent.iterdir()) == []


@pytest.mark.root
async def test_room_that_is_freed_goes_back_to_the_host(
    images: ImageVolumes, tmp_path: Path
) -> None:
    one = new_uuid()
    image = tmp_path / "volumes" / f"{one}.ext4"
    async with images.open(one, QUOTA) as place:
        (place / "f").write_bytes(os.urandom(20 * 2**20))
        os.sync()
        most = image.stat().st_blocks
        (place / "f").unlink()
        os.sync()
    await images.close()
    assert most - image.stat().st_blocks > 15 * 2**11


@pytest.mark.root
async def test_what_nobody_uses_is_unmounted(images: ImageVolumes) -> None:
    one = new_uuid()
    async with images.open(one, QUOTA) as place:
        await images.rest(idle_s=-1)
        assert mounted(place)
    await images.rest()
    assert mounted(place)
    await images.rest(idle_s=-1)
    assert not mounted(place)
    async with images.open(one, QUOTA):
        assert mounted(place)


@pytest.mark.root
async def test_a_full_disk_of_the_host_costs_what_was_not_synced_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", small], check=True)
    # What is unmounted in it is unmounted in the namespaces of other tests as well.
    subprocess.run(["mount", "--make-shared", small], check=True)
    images, one, held = ImageVolumes(small / "volumes"), new_uuid(), ExitStack()
    try:
        async with images.open(one, 256 * 2**20) as place:
            (place / "kept").write_bytes(b"kept" * 2**18)
            os.sync()
            # Whoever writes past the host's disk is told, if he asks.
            with (
                pytest.raises(OSError, match=r"error|space|system"),
                (place / "large").open("wb", buffering=0) as file,
            ):
                for _ in range(200):
                    file.write(os.urandom(2**20))
                    os.fsync(file.fileno())
            for number in range(2000):
                try:
                    (place / f"{number}").write_bytes(b"x" * 4096)
                except OSError:
                    break
            os.sync()
            for number in range(2000):  # until it takes nothing at all
                try:
                    (place / f"in {number}").mkdir()
                    os.sync()
                except OSError as error:
                    if error.errno == errno.EROFS:
                        break
            # Only once there is room is it worth anybody's while to let go of it.
            assert await images.stuck([one]) == []
            subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
            assert await images.stuck([new_uuid(), one]) == [one]
            assert (place / "kept").read_bytes() == b"kept" * 2**18
            other = subprocess.Popen(["unshare", "--mount", "sleep", "300"])
            held.callback(other.wait)
            held.callback(other.kill)
            async with asyncio.timeout(30):
                while os.readlink(f"/proc/{other.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
                    await asyncio.sleep(0.01)
        # As long as another mount namespace has it, it cannot be checked, and stays refused.
        monkeypatch.setattr(volumes_of_images, "_RELEASE_S", 0.2)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="still in use"):
                async with images.open(one, 256 * 2**20):
                    pass
        held.close()
        monkeypatch.undo()
        (small / "volumes" / "room").touch()
        async with images.open(one, 256 * 2**20) as place:
            assert await images.stuck([one]) == []
            assert (place / "kept").read_bytes() == b"kept" * 2**18
            # What the check of the file system has made is no reason to count anew.
            assert (await images.use_of(one, 256 * 2**20)).used_bytes >= 2**20
            (place / "new").write_bytes(b"new")
            os.sync()
            assert (place / "new").read_bytes() == b"new"
    finally:
        held.close()
        await images.close()
        subprocess.run(["umount", small], check=True)


@pytest.mark.root
async def test_the_view_of_hypervisors_keeps_no_volume_in_use(
    images: ImageVolumes, tmp_path: Path
) -> None:
    one = new_uuid()
    async with images.open(one, QUOTA):
        await make_mounts(tmp_path, tmp_path / "volumes")
        try:
            view = f"--mount={mounts_of(tmp_path)}"
            seen = subprocess.run(
                ["nsenter", view, "cat", "/proc/self/mounts"], capture_output=True, check=True
            ).stdout.decode()
            assert one not in seen
            assert mounted(tmp_path / "volumes" / one)
        finally:
            await remove_mounts(tmp_path)


@pytest.mark.root
async def test_files_beside_a_volume_are_neither_hidden_nor_in_the_way(
    images: ImageVolumes, tmp_path: Path
) -> None:
    one, other = new_uuid(), new_uuid()
    for name in (one, other):
        (tmp_path / "volumes" / name).mkdir(parents=True)
        (tmp_path / "volumes" / name / "kept").touch()
    with pytest.raises(UnavailableError, match="folders"):
        async with images.open(one, QUOTA):
            pass
    await images.rest(idle_s=-1)
    await images.close()
    await images.remove(one)
    assert os.listdir(tmp_path / "volumes") == [other]


@pytest.mark.root
async def test_what_was_begun_and_broken_off_is_begun_anew(
    images: ImageVolumes, tmp_path: Path
) -> None:
    one = new_uuid()
    folder = tmp_path / "volumes"
    folder.mkdir()
    (folder / f"{one}.part").write_bytes(b"half of one")
    (folder / one).mkdir()
    async with images.open(one, QUOTA) as place:
        assert os.listdir(place) == []
    assert not list(folder.glob("*.part"))
